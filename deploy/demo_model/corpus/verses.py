"""Poems, haiku and jokes."""

# ruff: noqa: E501 -- one text a line reads better than wrapped text

HAIKU = """
autumn|A leaf turns to gold / It lets go of the old branch / and learns how to fly
winter|Snow on the still pond / One small bird waits on the fence / for the sun to come
spring|The ice says goodbye / A green tip looks from the ground / and asks: Is it time?
summer|Warm wind in the grass / The long day forgets to end / Crickets count the stars
the sea|Waves come, and waves go / The sea writes upon the sand / and wipes the page clean
the moon|The moon in my cup / I drink it, and there it is / back up in the sky
rain|Rain on the tin roof / A thousand tiny drummers / play me into sleep
a cat|The cat on the sill / is watching the evening come / with two yellow moons
a frog|A frog on a stone / thinks for a very long time / and then jumps: a splash
the night|The town is asleep / One window is still awake / and talks with the stars
a tree|The old tree stands still / It has seen a hundred springs / and waits for the next
a computer|A light blinks at night / The machine is counting words / and dreams of the next
a river|The river moves on / It never asks for the way / and still finds the sea
the wind|Nobody sees it / but the tall grass bows its head / when the wind walks by
morning|The first light comes in / The birds have so much to say / Coffee has the rest
"""

POEMS = """
the sea|The sea is wide, the sea is blue, / it sings a song for me and you. / The waves come in, the waves go out, / and gulls fly round and round about.
the moon|The moon looks in, so round and bright, / and fills my room with silver light. / It says: Sleep well, and do not fear, / for I will watch, and I am near.
rain|The rain falls down on roof and tree, / it taps a little song for me. / And when the clouds have gone away, / a rainbow ends the rainy day.
a cat|My cat sits by the window pane / and looks at birds and drops of rain. / She does not work, she does not write, / she sleeps all day and plays all night.
a tree|There stands a tree upon the hill, / when all the world is calm and still. / It gives us shade, it gives us air, / and little birds are living there.
the stars|The stars are far, the stars are small, / I try, but cannot count them all. / I count to ten, and then once more, / and then I sleep, at number four.
winter|The snow is white, the nights are long, / the fire sings a quiet song. / So put your boots and mittens on, / and play until the day is gone.
spring|The snow has gone, the sun is here, / the birds are singing loud and clear. / The flowers wake, the grass is new, / and all the sky is shining blue.
summer|The days are long, the sky is blue, / the sun shines down on me and you. / We run and swim and climb a tree, / and eat our lunch beside the sea.
autumn|The leaves are yellow, brown and red, / they make the ground a golden bed. / The wind is cold, the days are few, / but there is tea for me and you.
a friend|A friend is someone who is there / to laugh, to listen, and to share. / When days are dark and skies are grey, / a friend can chase the clouds away.
a dog|My dog is brown, my dog is small, / and all he wants is just a ball. / I throw it once, he brings it back, / and then he wants a little snack.
a bird|A little bird sat on a tree / and sang a morning song for me. / I clapped my hands, it flew away. / I hope it comes another day.
love|Love is a light that will not fade, / a quiet place, a bit of shade. / It does not shout, it does not run, / it warms you slowly, like the sun.
a computer|A small machine upon a shelf / is talking softly to itself. / It counts in ones, it counts in twos, / and writes the word that it would choose.
the night|The night is dark, the night is deep, / and everyone has gone to sleep. / The owl alone is still awake / and looks at stars upon the lake.
"""

JOKES = (
    "Why did the bicycle fall over? Because it was two tired.",
    "What do you call a bear without teeth? A gummy bear.",
    "Why did the book go to the doctor? It hurt its spine.",
    "What is brown and sticky? A stick.",
    "Why can a nose not be twelve inches long? Because then it would be a foot.",
    "What did one wall say to the other? I will meet you at the corner.",
    "Why was six afraid of seven? Because seven ate nine.",
    "What has four wheels and flies? A garbage truck.",
    "Why did the computer go to bed early? It needed to sleep mode.",
    "What do you get when you cross a snowman and a dog? Frostbite.",
    "Why do bees hum? Because they do not know the words.",
    "What is a cat's favourite colour? Purr-ple.",
    "Why did the GPU feel lonely? It had no one to talk to in parallel.",
    "What did the ocean say to the beach? Nothing, it just waved.",
)
