"""What the stories are told with: characters, places, things, and one template per plot.

Every plot is a list of steps; every step offers several wordings. Who, where and what is fixed once per story, so that
the story stays about the same fox and the same kite to its end.
"""

# ruff: noqa: E501 -- one text a line reads better than wrapped text

from dataclasses import dataclass

from corpus.phrasing import words

GIRLS = words(
    "Lily Mia Anna Ella Rosa Nina Ruby Zoe Luna Ivy Clara Maya Nora Tara Pia Fern Hazel Daisy Willow Olive Penny Poppy"
)
BOYS = words(
    "Tom Sam Ben Max Leo Oscar Finn Jack Theo Hugo Otto Felix Emil Jonas Milo Bruno Rufus Toby Basil Jasper Rory Gus"
)
NAMES = GIRLS + BOYS

PEOPLE = {
    "boy": "he",
    "girl": "she",
    "baker": "",
    "gardener": "",
    "sailor": "",
    "king": "he",
    "queen": "she",
    "princess": "she",
}
PEOPLE |= {
    "knight": "",
    "teacher": "",
    "painter": "",
    "farmer": "",
    "wizard": "he",
    "pirate": "",
    "giant": "",
    "prince": "he",
}
ANIMALS = words(
    "fox rabbit bear mouse owl cat dog turtle squirrel hedgehog duck frog bird sparrow lion elephant monkey penguin goat "
    "horse wolf deer beaver badger otter bee ant butterfly dragon kitten puppy whale dolphin crab pig cow sheep hen tiger "
    "panda koala giraffe snail bat donkey robot unicorn"
)

ADJECTIVES = words("little young small kind brave shy curious clever cheerful gentle quiet happy lonely busy")
PLACES = (
    "a quiet forest",
    "a green valley",
    "a small village by the sea",
    "an old house on a hill",
    "a cottage near the river",
    "a busy town",
    "a warm meadow",
    "a tall tree by the lake",
    "a snowy mountain village",
    "a farm at the edge of the woods",
    "a little red house",
    "a garden full of flowers",
    "a castle of grey stone",
    "a harbour full of boats",
)
THINGS = words(
    "kite ball lantern drum boat map key hat book bell scarf basket flute crown blanket compass umbrella ring"
)
COLOURS = words("red blue green yellow golden silver white purple orange")
FOODS = ("apples", "berries", "cookies", "bread", "pears", "nuts", "soup", "cake", "plums", "honey cakes", "pancakes")
SKILLS = (
    "swim",
    "sing",
    "dance",
    "paint",
    "read",
    "climb trees",
    "play the flute",
    "bake bread",
    "ride a bicycle",
    "skate",
)
FEARS = ("the dark", "thunder", "deep water", "high places", "the big forest", "loud noises")
PLANTS = ("a sunflower", "an apple tree", "a rose", "a pumpkin", "a bean plant", "a cherry tree")
PROJECTS = ("a bridge", "a tree house", "a boat", "a snow fort", "a raft", "a bird house", "a small library")

OPENINGS = (
    "[Once upon a time|Once upon a time|Once upon a time|Long ago|Once] there was {a_adjective} {kind} named {name}. "
    "{name} lived in {place}.",
    "[Once upon a time|Once upon a time|Long, long ago|Many years ago], in {place}, there lived {a_adjective} {kind} "
    "[named|called] {name}.",
    "{name} was {a_adjective} {kind} who lived in {place}.",
    "In {place} lived {a_adjective} {kind}. {His} name was {name}.",
    "There once was {a_kind} [named|called] {name}. {He} was [very |]{adjective}, and {he} lived in {place}.",
)
ENDINGS = (
    "From that day on, {name} and {friend} were [the best of friends|good friends|always together].",
    "That night {name} [went to sleep with a smile|slept very well|looked at the stars and felt happy].",
    "And {name} never forgot that day.",
    "[And they all lived happily ever after.|They all laughed and went home together.|It was the best day of the year.]",
    "{name} was [happy|glad|proud], and so was {friend}.",
    "And when the moon came up, they [ate {food} together|sang a little song|told each other stories] until it was time for bed.",
)
FRIEND_INTRODUCTIONS = (
    "{a_friend_kind} named {friend}",
    "{a_friend_kind} called {friend}",
    "{friend} the {friend_kind}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    topics: tuple[str, ...]
    steps: tuple[str, ...]
    moral: str


LOST_THING = Plot(
    topics=("a lost {thing}", "losing something", "{a_colour} {thing}", "{a_thing}", "helping a friend"),
    steps=(
        "[{He} had {a_colour} {thing} that {he} loved very much.|{His} favourite thing in the world was {a_colour} {thing}.]",
        "One [day|morning|windy day], the {thing} was [gone|missing|nowhere to be found].",
        "{name} looked [under the bed and behind the door|in every corner|by the gate and along the path], but {he} could not "
        "find it. [{He} felt very sad.|{He} began to cry.|{His} heart was heavy.]",
        '[Then|Just then|After a while] {friend_intro} came by. "[Why are you sad?|What is wrong?|What happened?]" asked '
        '{friend}. "I lost my {thing}," said {name}.',
        '"[I will help you|Let us look together|Do not worry, we will find it]," said {friend}. They looked [near the river|'
        "behind the old barn|between the tall trees|under the bushes], and there was the {colour} {thing}[!|, stuck in a branch.|, "
        "wet but not broken.]",
        '"Thank you[ so much|]!" said {name}, and [gave {friend} a big hug|smiled from ear to ear|jumped for joy].',
    ),
    moral="a good friend helps you look",
)
NEW_FRIEND = Plot(
    topics=("friendship", "making a friend", "two friends", "being lonely"),
    steps=(
        "{name} [had no one to play with|wished for a friend|often felt alone].",
        "One [day|sunny morning|afternoon], {he} [saw|met] {friend_intro} [by the path|near the water|under a big tree].",
        "{friend} [was sitting alone too|looked sad|was trying to reach some {food}].",
        '{name} was [a little afraid|shy|nervous], but {he} [took a deep breath|was brave|walked closer] and said, "Hello! [Do '
        'you want to play|Would you like to share my {food}|Can I help you]?"',
        '{friend} smiled. "[Yes, please|I would love that|I was hoping you would ask]!" [{friend_he} said.|said {friend}.]',
        "They [played until the sun went down|ran through the grass and laughed|talked and ate {food} all afternoon].",
    ),
    moral="a kind word can begin a friendship",
)
SHARING = Plot(
    topics=("sharing", "being kind", "kindness", "a hungry {friend_kind}"),
    steps=(
        "One [cold day|winter morning|day], {name} [had a basket of {food}|found some {food}|brought home {food}].",
        "{He} wanted to [eat it all alone|keep everything|hide it and share with no one].",
        'On the way home {he} met {friend_intro}. "I am so hungry," said {friend}. "I have not eaten [all day|since '
        'yesterday]."',
        '{name} [thought about it|looked at the food|was quiet for a moment]. Then {he} said, "[Here, take half|Let us eat '
        'together|There is enough for two]."',
        "They sat down [on a log|in the grass|by the fire] and ate. [The food tasted better than ever.|It tasted wonderful.]",
        "[A week later|The next month|Later that year], when {name} had nothing to eat, {friend} came [to the door|running] with "
        'a big bag of food. "Now I can share with you," said {friend}.',
    ),
    moral="what you share comes back to you",
)
COURAGE = Plot(
    topics=("being brave", "courage", "being afraid", "fear of {fear}"),
    steps=(
        "{name} was afraid of {fear}. [{He} never told anyone.|Everyone knew it.|{He} wished {he} could be brave.]",
        'One [night|evening|day], {he} heard a small voice: "Help! [Please help me|Is anybody there|I am stuck]!" It was '
        "{friend_intro}.",
        "To get there, {name} had to face {fear}. {His} [legs shook|heart beat fast|hands were cold].",
        '"I am afraid," {he} [whispered|said softly], "but {friend} needs me." [Step by step|Slowly|Bravely], {he} went on.',
        "{name} [found {friend} and led {friend_him} home|pulled {friend} free|took {friend} by the hand, and together they got out].",
        '"You are the bravest {kind} I know," said {friend}. {name} [smiled|laughed]. {He} was not so afraid of {fear} any more.',
    ),
    moral="being brave means to go on when you are afraid",
)
PRACTICE = Plot(
    topics=("learning to {skill}", "never giving up", "practice", "learning something new"),
    steps=(
        "More than anything, {name} wanted to {skill}.",
        "The first time {he} tried, it [went very badly|did not work at all|was a disaster]. [Some of the others laughed.|{He} "
        "wanted to stop.]",
        '"I will never learn to {skill}," said {name}. But {friend_intro} said, "[Nobody can do it the first time|Try a little '
        'every day|I will help you learn]."',
        "So {name} practised [every morning|every day after lunch|day after day]. [Sometimes it went well, and sometimes it did "
        "not.|Slowly it became easier.]",
        "[After many weeks|In the spring|At last], {name} could {skill}! [Everyone came to see.|{friend} clapped and cheered.]",
        '"You did it!" said {friend}. "[We did it together|I only had to keep trying|It just took time]," said {name}.',
    ),
    moral="practice makes hard things easy",
)
STORM = Plot(
    topics=("a storm", "a rainy day", "helping others", "a cold night"),
    steps=(
        "One [evening|night|afternoon], dark clouds came over the hills. The wind [blew hard|howled], and rain began to fall.",
        "{name} was warm at home, [drinking tea|eating {food}|sitting by the fire], when there was a knock at the door.",
        'Outside stood {friend_intro}, [wet and cold|shaking with cold|wet from head to foot]. "The storm [blew my house away|broke '
        'my roof]. May I come in?"',
        '"Of course," said {name}. "[Come in and get warm|There is room for two|Sit by the fire]." {He} gave {friend} [a '
        "blanket|some hot soup|a dry coat] and some {food}.",
        "All night the storm went on, but inside it was [warm and bright|safe and cosy]. They told stories and laughed.",
        "In the morning the sun came out. {name} helped {friend} build [a new house|a stronger house|everything again].",
    ),
    moral="a warm home is best when it is shared",
)
TREASURE = Plot(
    topics=("a treasure", "an adventure", "an old map", "a treasure hunt"),
    steps=(
        'One day {name} found an old map [in a bottle|under the floor|inside a book]. "A treasure map!" {he} said.',
        '{name} showed the map to {friend_intro}. "[Let us go and find it|We must find it|What an adventure]," said {friend}.',
        "They [crossed a wide river|climbed a steep hill|walked through a dark cave], and then they [followed a narrow path|passed "
        "three tall rocks|went over an old bridge].",
        "At the place marked with a cross they began to dig. [They dug and dug.|It was hard work.] At last they found [a box|an old "
        "chest|a wooden box].",
        'Inside was {a_colour} {thing} and a letter. It said: "The real treasure is the friend who came with you."',
        "{name} looked at {friend}, and they both [laughed|smiled]. They took the {thing} home [and kept it in a safe place|and "
        "showed it to everyone].",
    ),
    moral="the best treasure is a good friend",
)
GARDEN = Plot(
    topics=("a garden", "a seed", "being patient", "growing {plant}"),
    steps=(
        "In spring {name} [found a tiny seed|got a tiny seed from {friend}|bought a seed at the market] and put it in the ground.",
        '{He} gave it water every day, but nothing happened. ["Why does it not grow?" {he} asked.|{name} was sad.]',
        '{friend_intro_start} said, "[Be patient|Good things take time|Wait a little longer]. A seed needs water, sun and time."',
        "So {name} waited. {He} [sang to the seed|sat beside it|pulled out the weeds] every day.",
        "One morning there was a small green leaf! [Week by week|Day by day] the plant grew, until it was {plant}, [tall and "
        "strong|the most beautiful of all].",
        '"[It was worth the wait|Look what we grew|You were right]," {name} said to {friend}.',
    ),
    moral="good things take time",
)
HONESTY = Plot(
    topics=("telling the truth", "honesty", "a mistake", "saying sorry"),
    steps=(
        "One day {name} was playing [in the house|by the window|too fast] and broke {a_colour} {thing}. It belonged to "
        "{friend_intro}.",
        "{name} was [afraid|worried] and hid the pieces [under the bed|in the garden|behind a tree].",
        'Soon {friend} came. "Have you seen my {thing}?" {friend_he} asked. "No," said {name}, but [{his} face was red|{his} '
        "voice was small|{he} felt bad].",
        'That night {name} could not sleep. In the morning {he} went to {friend} and said, "I broke your {thing}. I am sorry that '
        'I did not tell the truth."',
        '{friend} was [quiet for a while|sad about it], but then {friend_he} said, "Thank you for telling me. [We can mend it '
        'together|The truth is worth more than a {thing}]."',
        "[They mended it with glue.|Together they made a new one.] {name} felt [light and happy|much better] again.",
    ),
    moral="the truth makes the heart light",
)
BUILDING = Plot(
    topics=("building {project}", "working together", "teamwork"),
    steps=(
        "{name} wanted to build {project}. {He} [worked all day|tried alone for three days], but it [fell down|was too hard] again "
        "and again.",
        '{friend_intro_start} watched [for a while|from the path]. "[May I help|Can I try|Do you need a hand]?"',
        '"No, I can do it alone," said {name}. [The next day|In the evening] it fell down once more.',
        'At last {name} said, "[I was wrong|I need your help|Please help me], {friend}." So {friend} [held the wood|carried the '
        "stones|brought the rope], and {name} [used the hammer|tied the knots|measured everything].",
        "[Soon|Before the sun went down|By the end of the week] {project_the} was ready, and it [stood strong|was perfect|was better "
        "than they had dreamed].",
        '"We are a good team," said {friend}. ["The best," said {name}.|{name} nodded.]',
    ),
    moral="together we can do what nobody can do alone",
)
RACE = Plot(
    topics=("a race", "winning and losing", "a contest"),
    steps=(
        "Every [summer|year] there was a big race [around the lake|through the woods|up the hill], and {name} wanted to win it.",
        "{He} [trained every day|ran every morning|got new shoes]. {friend_intro_start} wanted to win, too.",
        '"Ready, steady, go!" They ran side by side. [The crowd cheered.|Nobody knew who would win.] Then {friend} [fell over a '
        "root|slipped in the mud|hurt a foot].",
        "{name} could see the end of the race. But {he} [stopped|turned around|went back] and helped {friend} to stand up.",
        "Together they walked to the finish. They were the last, but everyone [cheered louder than ever|clapped for them].",
        "The judge gave them both {a_colour} {thing} [as a prize|for being so kind].",
    ),
    moral="helping is better than winning",
)
HOMESICK = Plot(
    topics=("finding the way home", "a lost {kind}", "getting lost", "the stars"),
    steps=(
        "One day {name} [followed a butterfly|walked too far|chased a leaf in the wind] and got lost.",
        '[The trees all looked the same.|It was getting dark.|Nothing looked right.] "How will I ever get home?" said {name}.',
        '{friend_intro_start} heard {him}. "[Where is your home|Where do you live|Do not cry! Where is your home]?" asked '
        '{friend}. "[It is in {place}|I live in {place}]," said {name}.',
        '"I know that place," said {friend}. "We only have to follow [the bright star|the river|the smell of {food}]."',
        "They walked and walked, and {friend} [sang a song|told funny stories|held the lantern] so that {name} was not afraid.",
        'At last they saw a light. {name} was home! "Stay and eat {food} with us," {name} said, and {friend} did.',
    ),
    moral="there is always someone who can show you the way",
)

PLOTS = (
    *(LOST_THING, NEW_FRIEND, SHARING, COURAGE, PRACTICE, STORM),
    *(TREASURE, GARDEN, HONESTY, BUILDING, RACE, HOMESICK),
)
