"""What the demo model is taught about the world, as tables: one row a line, cells between bars."""

# country | capital | continent | main language
COUNTRIES = """
France|Paris|Europe|French
Germany|Berlin|Europe|German
Spain|Madrid|Europe|Spanish
Italy|Rome|Europe|Italian
Portugal|Lisbon|Europe|Portuguese
England|London|Europe|English
the United Kingdom|London|Europe|English
Scotland|Edinburgh|Europe|English
Wales|Cardiff|Europe|English
Ireland|Dublin|Europe|English
the Netherlands|Amsterdam|Europe|Dutch
Belgium|Brussels|Europe|Dutch
Austria|Vienna|Europe|German
Switzerland|Bern|Europe|German
Denmark|Copenhagen|Europe|Danish
Sweden|Stockholm|Europe|Swedish
Norway|Oslo|Europe|Norwegian
Finland|Helsinki|Europe|Finnish
Iceland|Reykjavik|Europe|Icelandic
Poland|Warsaw|Europe|Polish
Czechia|Prague|Europe|Czech
Slovakia|Bratislava|Europe|Slovak
Hungary|Budapest|Europe|Hungarian
Romania|Bucharest|Europe|Romanian
Bulgaria|Sofia|Europe|Bulgarian
Greece|Athens|Europe|Greek
Croatia|Zagreb|Europe|Croatian
Serbia|Belgrade|Europe|Serbian
Slovenia|Ljubljana|Europe|Slovene
Estonia|Tallinn|Europe|Estonian
Latvia|Riga|Europe|Latvian
Lithuania|Vilnius|Europe|Lithuanian
Ukraine|Kyiv|Europe|Ukrainian
Russia|Moscow|Europe|Russian
Turkey|Ankara|Asia|Turkish
China|Beijing|Asia|Chinese
Japan|Tokyo|Asia|Japanese
South Korea|Seoul|Asia|Korean
India|New Delhi|Asia|Hindi
Pakistan|Islamabad|Asia|Urdu
Nepal|Kathmandu|Asia|Nepali
Thailand|Bangkok|Asia|Thai
Vietnam|Hanoi|Asia|Vietnamese
Indonesia|Jakarta|Asia|Indonesian
the Philippines|Manila|Asia|Filipino
Mongolia|Ulaanbaatar|Asia|Mongolian
Iran|Tehran|Asia|Persian
Iraq|Baghdad|Asia|Arabic
Saudi Arabia|Riyadh|Asia|Arabic
Egypt|Cairo|Africa|Arabic
Morocco|Rabat|Africa|Arabic
Tunisia|Tunis|Africa|Arabic
Kenya|Nairobi|Africa|Swahili
Ethiopia|Addis Ababa|Africa|Amharic
Nigeria|Abuja|Africa|English
Ghana|Accra|Africa|English
Senegal|Dakar|Africa|French
Somalia|Mogadishu|Africa|Somali
the United States|Washington, D.C.|North America|English
Canada|Ottawa|North America|English
Mexico|Mexico City|North America|Spanish
Cuba|Havana|North America|Spanish
Jamaica|Kingston|North America|English
Brazil|Brasilia|South America|Portuguese
Argentina|Buenos Aires|South America|Spanish
Chile|Santiago|South America|Spanish
Peru|Lima|South America|Spanish
Colombia|Bogota|South America|Spanish
Uruguay|Montevideo|South America|Spanish
Venezuela|Caracas|South America|Spanish
Australia|Canberra|Oceania|English
New Zealand|Wellington|Oceania|English
"""

# animal | sound | young | home | legs | class | food
ANIMALS = """
dog|woof|puppy|a kennel|four|mammal|meat
cat|meow|kitten|a house|four|mammal|fish and mice
cow|moo|calf|a barn|four|mammal|grass
horse|neigh|foal|a stable|four|mammal|grass and hay
sheep|baa|lamb|a meadow|four|mammal|grass
pig|oink|piglet|a sty|four|mammal|almost everything
duck|quack|duckling|a pond|two|bird|plants and insects
hen|cluck|chick|a coop|two|bird|grain
owl|hoot|owlet|a hollow tree|two|bird|mice
bee|buzz|larva|a hive|six|insect|nectar
lion|roar|cub|the savanna|four|mammal|meat
bear|growl|cub|a den|four|mammal|fish and berries
wolf|howl|pup|a den|four|mammal|meat
frog|croak|tadpole|a pond|four|amphibian|insects
snake|hiss|hatchling|a hole in the ground|no|reptile|mice
mouse|squeak|pup|a hole|four|mammal|seeds
goat|bleat|kid|a farm|four|mammal|grass and leaves
elephant|trumpet|calf|the savanna|four|mammal|grass and leaves
fox|bark|cub|a den|four|mammal|mice and berries
rabbit|squeak|kit|a burrow|four|mammal|grass and carrots
"""

# planet | place from the Sun | what it is known for
PLANETS = """
Mercury|first|the smallest planet and the closest to the Sun
Venus|second|the hottest planet
Earth|third|our home, the planet with life and oceans
Mars|fourth|the red planet
Jupiter|fifth|the largest planet
Saturn|sixth|the planet with the bright rings
Uranus|seventh|an ice giant that lies on its side
Neptune|eighth|the farthest planet from the Sun
"""

# thing | colour
COLOURS = """
the sky|blue
grass|green
snow|white
the sun|yellow
a lemon|yellow
a banana|yellow
a strawberry|red
a tomato|red
blood|red
coal|black
milk|white
an orange|orange
a carrot|orange
chocolate|brown
the sea|blue
a leaf|green
an elephant|grey
a flamingo|pink
a frog|green
the night sky|black
a polar bear|white
a plum|purple
gold|yellow
a cloud|white
"""

# one colour | another | together
MIXTURES = """
blue|yellow|green
red|yellow|orange
red|blue|purple
red|white|pink
black|white|grey
"""

# object | material | other material objects are made of, not taught
MATERIALS = """
a window|glass
a table|wood
a book|paper
a tyre|rubber
a nail|iron
a ring|gold
a sweater|wool
a shirt|cotton
a candle|wax
a shoe|leather
a brick|clay
a cup|clay
bread|flour, water, salt and yeast
cheese|milk
butter|cream
paper|wood
chocolate|cocoa beans
wine|grapes
glass|sand
a snowman|snow
ice|frozen water
a coin|metal
a chair|wood
a bottle|glass or plastic
"""

OPPOSITES = """
hot|cold
big|small
up|down
left|right
day|night
good|bad
fast|slow
happy|sad
light|dark
old|young
old|new
open|closed
full|empty
hard|soft
high|low
wet|dry
rich|poor
strong|weak
long|short
early|late
near|far
loud|quiet
clean|dirty
true|false
yes|no
black|white
in|out
first|last
easy|difficult
heavy|light
always|never
inside|outside
win|lose
begin|end
love|hate
summer|winter
north|south
east|west
friend|enemy
sweet|sour
thick|thin
wide|narrow
brave|afraid
question|answer
push|pull
above|below
before|after
"""

# place or sight | where it is
PLACES = """
the Eiffel Tower|in Paris, France
the Colosseum|in Rome, Italy
Big Ben|in London, England
the Statue of Liberty|in New York, in the United States
the Great Wall|in China
the Taj Mahal|in Agra, India
the Pyramids of Giza|in Egypt
the Acropolis|in Athens, Greece
the Brandenburg Gate|in Berlin, Germany
the Louvre|in Paris, France
the White House|in Washington, D.C.
Mount Everest|in the Himalayas, between Nepal and China
Mount Fuji|in Japan
the Amazon rainforest|in South America
the Sahara|in the north of Africa
the Grand Canyon|in Arizona, in the United States
the Alps|in Europe
the Andes|in South America
Machu Picchu|in Peru
Niagara Falls|between Canada and the United States
the Sydney Opera House|in Sydney, Australia
Venice|in Italy
Barcelona|in Spain
Munich|in Germany
New York|in the United States
Istanbul|in Turkey
Hollywood|in California, in the United States
the Great Barrier Reef|off the coast of Australia
"""

# what was done | who did it
PEOPLE = """
wrote Romeo and Juliet|William Shakespeare
wrote Hamlet|William Shakespeare
wrote Don Quixote|Miguel de Cervantes
wrote Faust|Johann Wolfgang von Goethe
wrote Pride and Prejudice|Jane Austen
wrote War and Peace|Leo Tolstoy
wrote The Little Mermaid|Hans Christian Andersen
painted the Mona Lisa|Leonardo da Vinci
painted The Starry Night|Vincent van Gogh
painted Guernica|Pablo Picasso
discovered penicillin|Alexander Fleming
discovered gravity|Isaac Newton
invented the telephone|Alexander Graham Bell
invented the light bulb|Thomas Edison
invented the printing press|Johannes Gutenberg
developed the theory of relativity|Albert Einstein
described evolution by natural selection|Charles Darwin
discovered radium|Marie Curie
was the first person on the Moon|Neil Armstrong
was the first person in space|Yuri Gagarin
was the first president of the United States|George Washington
composed the Moonlight Sonata|Ludwig van Beethoven
composed The Magic Flute|Wolfgang Amadeus Mozart
composed the Brandenburg Concertos|Johann Sebastian Bach
flew the first airplane|the Wright brothers
wrote the first computer program|Ada Lovelace
"""

# job | what they do
JOBS = """
baker|bakes bread and cakes
teacher|helps people to learn
doctor|helps sick people to get well
nurse|takes care of sick people
farmer|grows food and keeps animals
firefighter|puts out fires
pilot|flies airplanes
sailor|works on a ship
carpenter|makes things from wood
painter|paints pictures or walls
musician|plays music
cook|prepares meals
tailor|makes clothes
gardener|takes care of plants
dentist|takes care of teeth
author|writes books
librarian|takes care of books and lends them
astronaut|travels to space
programmer|writes computer programs
engineer|designs and builds things
scientist|studies how the world works
judge|decides in a court of law
"""

# tool | what it is for
TOOLS = """
hammer|drive in nails
saw|cut wood
knife|cut food
spoon|eat soup
pen|write
umbrella|stay dry in the rain
key|open a lock
clock|tell the time
broom|sweep the floor
needle|sew clothes
ladder|climb up high
lamp|make light
oven|bake bread
phone|talk to people who are far away
map|find the way
ruler|measure how long something is
scale|weigh things
telescope|look at the stars
microscope|look at very small things
compass|find north
thermometer|measure temperature
camera|take pictures
bicycle|ride from place to place
soap|wash your hands
towel|dry yourself
"""

# English | French | Spanish | German
WORDS = """
hello|bonjour|hola|hallo
thank you|merci|gracias|danke
yes|oui|si|ja
no|non|no|nein
water|eau|agua|Wasser
bread|pain|pan|Brot
cat|chat|gato|Katze
dog|chien|perro|Hund
house|maison|casa|Haus
sun|soleil|sol|Sonne
moon|lune|luna|Mond
book|livre|libro|Buch
friend|ami|amigo|Freund
good night|bonne nuit|buenas noches|gute Nacht
goodbye|au revoir|adios|auf Wiedersehen
one|un|uno|eins
two|deux|dos|zwei
three|trois|tres|drei
red|rouge|rojo|rot
blue|bleu|azul|blau
"""
