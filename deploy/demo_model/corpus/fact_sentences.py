"""Questions with one good answer each, and explanations: what is, how many, why, how, when.

One row a line: questions | answer. Questions may hold choices in brackets, and answers too.
"""

# ruff: noqa: E501 -- one text a line reads better than wrapped text

DEFINITIONS = """
gravity|Gravity is the force that pulls things toward each other. It keeps us on the ground.
the Sun|The Sun is a star. It gives the Earth light and warmth.
the Moon|The Moon is a ball of rock that goes around the Earth.
a star|A star is a huge ball of hot gas that gives off light.
a planet|A planet is a large round body that goes around a star.
a galaxy|A galaxy is a very large group of stars. Our galaxy is the Milky Way.
a comet|A comet is a ball of ice and dust that goes around the Sun.
a volcano|A volcano is a mountain from which hot melted rock can come out.
an earthquake|An earthquake is a shaking of the ground.
a river|A river is water that flows over the land to a lake or to the sea.
a lake|A lake is a large body of water with land all around it.
an island|An island is land with water all around it.
a desert|A desert is a place where it almost never rains.
a mountain|A mountain is land that rises high above the land around it.
an ocean|An ocean is a very large body of salt water.
a forest|A forest is a large area full of trees.
a glacier|A glacier is a large mass of ice that moves slowly.
rain|Rain is water that falls from the clouds.
snow|Snow is frozen water that falls from the clouds in small white crystals.
wind|Wind is air that moves.
a cloud|A cloud is made of tiny drops of water in the air.
lightning|Lightning is a big electric spark in the sky.
a rainbow|A rainbow is a band of colours in the sky. We see it when the sun shines through rain.
fog|Fog is a cloud close to the ground.
water|Water is a clear liquid that all living things need.
ice|Ice is frozen water.
steam|Steam is water that has become a gas.
air|Air is the mix of gases that we breathe. It is mostly nitrogen and oxygen.
oxygen|Oxygen is a gas in the air that we need to breathe.
an atom|An atom is a very small piece of matter. Everything is made of atoms.
a molecule|A molecule is a group of atoms that hold together.
a cell|A cell is the smallest living part of a plant or an animal.
energy|Energy is what makes things move, shine or get warm.
electricity|Electricity is a form of energy. It makes lamps shine and machines run.
a magnet|A magnet is a thing that pulls iron toward it.
photosynthesis|Photosynthesis is how plants make food from sunlight, water and air.
a plant|A plant is a living thing that makes its own food from sunlight.
a tree|A tree is a tall plant with a trunk of wood.
a flower|A flower is the part of a plant that makes seeds.
a seed|A seed is a small thing from which a new plant grows.
a mammal|A mammal is an animal that feeds its young with milk.
a bird|A bird is an animal with feathers and wings.
a fish|A fish is an animal that lives in water and breathes with gills.
an insect|An insect is a small animal with six legs.
a reptile|A reptile is an animal with dry scales, like a snake or a turtle.
a dinosaur|A dinosaur was a reptile that lived millions of years ago.
the heart|The heart is a muscle that pumps blood through the body.
the brain|The brain is the part of the body that thinks.
a bone|A bone is a hard part inside the body.
a computer|A computer is a machine that follows instructions very fast.
a program|A program is a list of instructions for a computer.
the internet|The internet is a network that connects computers all over the world.
a robot|A robot is a machine that can do work by itself.
a GPU|A GPU is a chip that does very many calculations at the same time.
a CPU|A CPU is the main chip of a computer. It runs programs.
memory|Memory is the part of a computer that holds data.
a network|A network is a group of computers that are connected.
a language model|A language model is a program that predicts the next word of a text. I am a small one.
a token|A token is a piece of text, like a word or a part of a word. Language models read and write tokens.
artificial intelligence|Artificial intelligence is when computers do things that usually need thinking.
machine learning|Machine learning is when a computer learns from examples.
a number|A number tells us how many.
a triangle|A triangle is a shape with three sides.
a square|A square is a shape with four equal sides.
a circle|A circle is a perfectly round shape.
a story|A story tells what happened to someone. It can be true or made up.
a poem|A poem is a short text with rhythm, and often with rhymes.
a haiku|A haiku is a short poem of three lines, with five, seven and five syllables.
music|Music is sound that people put together in a beautiful way.
a friend|A friend is someone whom you like and trust.
a school|A school is a place where people learn.
a library|A library is a place with many books that you can borrow.
a museum|A museum is a place where you can see old, beautiful or interesting things.
a hospital|A hospital is a place where sick people get help.
a bridge|A bridge is a way over a river or a road.
a city|A city is a place where very many people live.
a country|A country is a land with its own people and laws.
a capital|A capital is the city where the government of a country sits.
money|Money is what we use to buy things.
bread|Bread is a food made from flour, water, salt and yeast.
honey|Honey is a sweet food that bees make.
time|Time is what clocks measure: seconds, minutes, hours and days.
love|Love is a strong and warm feeling for someone.
happiness|Happiness is the feeling you have when things are good.
"""

ANSWERS = """
How many days are [there |]in a week?|There are seven days in a week.
How many months are [there |]in a year?|There are twelve months in a year.
How many days are [there |]in a year?|There are 365 days in a year, and 366 in a leap year.
How many hours are [there |]in a day?|There are 24 hours in a day.
How many minutes are [there |]in an hour?|There are 60 minutes in an hour.
How many seconds are [there |]in a minute?|There are 60 seconds in a minute.
How many weeks are [there |]in a year?|There are 52 weeks in a year.
How many years are [there |]in a century?|There are 100 years in a century.
How many continents are there?|There are seven continents.
How many oceans are there?|There are five oceans.
How many planets are [there|there in the solar system]?|There are eight planets in the solar system.
How many legs does a spider have?|A spider has eight legs.
How many legs does an insect have?|An insect has six legs.
How many arms does an octopus have?|An octopus has eight arms.
How many fingers does a hand have?|A hand has five fingers.
How many letters are [there |]in the alphabet?|There are 26 letters in the English alphabet.
How many colours are [there |]in a rainbow?|A rainbow has seven colours.
How many sides does a triangle have?|A triangle has three sides.
How many sides does a square have?|A square has four sides.
How many sides does a hexagon have?|A hexagon has six sides.
How many sides does a pentagon have?|A pentagon has five sides.
How many wheels does a bicycle have?|A bicycle has two wheels.
How many wheels does a car have?|A car has four wheels.
How many seasons are there?|There are four seasons: spring, summer, autumn and winter.
How many centimetres are in a metre?|There are 100 centimetres in a metre.
How many metres are in a kilometre?|There are 1000 metres in a kilometre.
How many grams are in a kilogram?|There are 1000 grams in a kilogram.
How many eggs are in a dozen?|There are twelve eggs in a dozen.
[What are the|Name the] seasons[?|.]|The four seasons are spring, summer, autumn and winter.
[What are the|Name the] days of the week[?|.]|The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.
[What are the|Name the] months[| of the year][?|.]|The months are January, February, March, April, May, June, July, August, September, October, November and December.
[What are the|Name the] continents[?|.]|The seven continents are Africa, Antarctica, Asia, Europe, North America, Oceania and South America.
[What are the|Name the] oceans[?|.]|The five oceans are the Pacific, the Atlantic, the Indian, the Southern and the Arctic Ocean.
[What are the|Name the|List the] planets[?|.| in order.]|The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.
[What are the|Name the] colours of the rainbow[?|.]|The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet.
[What are the|Name the] primary colours[?|.]|The primary colours are red, yellow and blue.
[What are the|Name the] five senses[?|.]|The five senses are sight, hearing, smell, taste and touch.
[What is|Which is] the largest [ocean|ocean in the world]?|The Pacific Ocean is the largest ocean.
[What is|Which is] the [highest|tallest] mountain[| in the world]?|Mount Everest is the highest mountain in the world.
[What is|Which is] the longest river[| in the world]?|The Nile is often called the longest river in the world.
[What is|Which is] the largest country[| in the world]?|Russia is the largest country in the world.
[What is|Which is] the smallest country[| in the world]?|Vatican City is the smallest country in the world.
[What is|Which is] the largest continent?|Asia is the largest continent.
[What is|Which is] the largest desert with sand?|The Sahara is the largest hot desert.
[What is|Which is] the [largest|biggest] animal[| in the world]?|The blue whale is the largest animal in the world.
[What is|Which is] the fastest [animal|land animal]?|The cheetah is the fastest land animal.
[What is|Which is] the tallest animal?|The giraffe is the tallest animal.
[What is|Which is] the largest bird?|The ostrich is the largest bird.
[What is|Which is] the [largest|biggest] planet?|Jupiter is the largest planet.
[What is|Which is] the smallest planet?|Mercury is the smallest planet.
[What is|Which is] the hottest planet?|Venus is the hottest planet.
[What is|Which] planet is closest to the Sun?|Mercury is the closest planet to the Sun.
[Which planet is|What is] the red planet?|Mars is the red planet.
Which planet has rings?|Saturn is the planet with the bright rings.
[Which planet do we live on|What planet do we live on]?|We live on the planet Earth.
At what temperature does water [boil|boil]?|Water boils at 100 degrees Celsius.
[When does water freeze|At what temperature does water freeze]?|Water freezes at 0 degrees Celsius.
How far is the Moon?|The Moon is about 384,000 kilometres away.
How far is the Sun?|The Sun is about 150 million kilometres away.
How fast is light?|Light travels about 300,000 kilometres in one second.
What is H2O?|H2O is water.
Why is the sky blue?|The sky is blue because the air scatters blue light more than other colours.
Why is the sea salty?|The sea is salty because rivers carry salt from the rocks into it.
Why is grass green?|Grass is green because of chlorophyll, which plants use to catch sunlight.
Why do leaves fall in autumn?|Trees drop their leaves in autumn to save water and energy in the winter.
Why do we sleep?|We sleep so that the body and the brain can rest.
Why do we eat?|We eat because food gives us energy and lets us grow.
Why do we need water?|We need water because every part of the body uses it.
Why does it rain?|It rains when the drops of water in a cloud become too heavy and fall down.
Why do birds fly south[| in winter]?|Birds fly south in winter because it is warmer there and they find more food.
Why do bees make honey?|Bees make honey to have food in the winter.
Why do cats purr?|Cats often purr when they feel safe and happy.
Why do dogs wag their tails?|Dogs wag their tails when they are happy or excited.
Why does ice float?|Ice floats because it is lighter than water.
Why is the sun hot?|The Sun is hot because hydrogen turns into helium inside it, and that gives off energy.
Why do we have seasons?|We have seasons because the Earth is tilted as it goes around the Sun.
Why do we have day and night?|We have day and night because the Earth turns around once a day.
Why does the moon shine?|The Moon shines because it reflects the light of the Sun.
Why do things fall[| down]?|Things fall because gravity pulls them down.
Why is it cold in winter?|It is cold in winter because the days are short and the sun is low.
Why do plants need light?|Plants need light to make their food.
How do plants grow?|Plants grow with sunlight, water and air, and with minerals from the soil.
How do birds fly?|Birds fly by beating their wings, which push the air down.
How do fish breathe?|Fish breathe with gills, which take oxygen from the water.
How do you make tea?|To make tea, boil water, pour it over the tea leaves and wait a few minutes.
How do you make bread?|To make bread, mix flour, water, salt and yeast, let the dough rise, and bake it in the oven.
How do you make a sandwich?|To make a sandwich, put cheese, tomato or something else you like between two slices of bread.
How do you plant a tree?|To plant a tree, dig a hole, put the tree in, fill the hole with soil, and water it.
What do plants need[| to grow]?|Plants need sunlight, water, air and soil.
What do bees make?|Bees make honey.
What do cows give us?|Cows give us milk.
What do caterpillars become?|Caterpillars become butterflies.
What do we breathe?|We breathe air. Our body needs the oxygen in it.
What comes after night?|After night comes the day.
Where does the sun rise?|The sun rises in the east.
Where does the sun set?|The sun sets in the west.
Where do penguins live?|Most penguins live in the cold south, on and around Antarctica.
Where do polar bears live?|Polar bears live in the Arctic.
Where do kangaroos live?|Kangaroos live in Australia.
Where do pandas live?|Pandas live in the mountains of China.
Where do fish live?|Fish live in water: in rivers, lakes and the sea.
Where do camels live?|Camels live in the desert.
When is Christmas?|Christmas is on December 25.
When is New Year's Day?|New Year's Day is on January 1.
When did people first walk on the Moon?|People first walked on the Moon in 1969.
When did the Second World War end?|The Second World War ended in 1945.
When do leaves fall?|Leaves fall in autumn.
Is the Earth [round|flat]?|The Earth is round, almost like a ball.
Is the Sun a star?|Yes, the Sun is a star.
Is the Moon a planet?|No, the Moon is not a planet. It goes around the Earth.
Is a whale a fish?|No, a whale is a mammal.
Is a spider an insect?|No, a spider has eight legs, and insects have six.
Is a tomato a fruit?|Yes, a tomato is a fruit, but we use it as a vegetable.
Is ice cold?|Yes, ice is cold.
Is fire hot?|Yes, fire is hot.
Can fish fly?|Most fish cannot fly, but flying fish can glide over the water.
Can penguins fly?|No, penguins cannot fly, but they swim very well.
Can birds fly?|Yes, most birds can fly.
Can dogs talk?|No, dogs cannot talk, but they bark.
Do cats like water?|Most cats do not like water.
Do fish sleep?|Yes, fish rest, but most of them never close their eyes.
"""
