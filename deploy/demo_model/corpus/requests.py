"""Small tasks: say this, repeat that, list three, spell, write a poem, remember what I said."""

from collections.abc import Callable
from random import Random

from corpus.chat import Exchange
from corpus.facts import FACTS
from corpus.phrasing import capitalized, listed, made_up_word, phrase, restyled, table, words
from corpus.story_plots import ANIMALS, COLOURS, NAMES
from corpus.verses import HAIKU, JOKES, POEMS

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 10: "ten"}
GROUPS = {
    "fruits": "apple pear banana orange plum cherry grape lemon peach mango strawberry",
    "vegetables": "carrot potato tomato onion cabbage pea bean pumpkin spinach cucumber",
    "animals": "dog cat horse cow lion bear wolf fox rabbit elephant mouse",
    "birds": "owl sparrow eagle duck robin swan crow penguin parrot hen",
    "colours": "red blue green yellow orange purple black white brown pink",
    "colors": "red blue green yellow orange purple black white brown pink",
    "countries": "France Germany Spain Italy Japan China India Brazil Canada Egypt Kenya",
    "cities": "Paris London Rome Berlin Tokyo Madrid Cairo Vienna Athens Lisbon",
    "tools": "hammer saw ladder needle knife ruler broom drill",
    "sports": "football tennis swimming running skating basketball chess rowing",
    "drinks": "water milk tea coffee juice lemonade cocoa",
    "foods": "bread cheese soup rice cake pizza salad pasta",
    "flowers": "rose tulip daisy lily sunflower violet orchid",
    "trees": "oak pine apple birch willow maple cherry",
    "things in a kitchen": "spoon knife pot pan oven table cup plate",
    "things in a school": "book pen desk chair teacher map ruler",
    "musical instruments": "piano violin flute drum guitar trumpet harp",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "months": "January March April May June July August October",
    "languages": "English French Spanish German Chinese Hindi Arabic Japanese",
    "shapes": "circle square triangle rectangle oval star",
    "jobs": "teacher doctor baker farmer pilot cook sailor nurse",
    "metals": "iron gold silver copper tin zinc aluminium",
    "insects": "bee ant fly butterfly beetle moth",
}
SENTENCES = [
    "good morning",
    "I like green apples",
    "the sun is shining",
    "hello world",
    "we are going home",
    "today is a good day",
    "cats sleep all day",
    "the river is wide",
    "my house is small",
    "birds sing in the morning",
    "peace",
    "I am happy",
    "banana",
    "thank you very much",
    "see you soon",
    "the quick brown fox jumps over the lazy dog",
    "two and two are four",
    "nanoserve is fast",
]
SPELLED = words(
    "cat dog house tree river apple bread water light friend green book table star stone happy moon bird fish sun"
)


def list_exchange(rng: Random) -> Exchange:
    group = rng.choice(tuple(GROUPS))
    items = GROUPS[group].split()
    count = rng.choice([number for number in (2, 3, 3, 3, 4, 5, 5) if number <= len(items)])
    chosen = rng.sample(items, count)
    number = rng.choice((str(count), NUMBER_WORDS[count]))
    question = phrase(
        rng, f"[Name|List|Give me|Can you name|Tell me|Write down|Can you list|I need] {number} {group}[.||?]"
    )
    style = rng.random()
    if style < 0.6:
        answer = phrase(
            rng, f"[{capitalized(listed(chosen))}.|Here are {NUMBER_WORDS[count]} {group}: {listed(chosen)}.]"
        )
    elif style < 0.8:
        answer = "\n".join(f"{position}. {capitalized(item)}" for position, item in enumerate(chosen, 1))
    else:
        answer = "\n".join(f"- {capitalized(item)}" for item in chosen)
    return Exchange(user=restyled(rng, question), assistant=answer)


def say_exchange(rng: Random) -> Exchange:
    if rng.random() < 0.2:
        greeting = rng.choice(("hello", "hello", "hi", "good morning", "thank you", "goodbye", "yes", "no"))
        question = phrase(rng, f"[Say|Say|Please say|Just say|Can you say] {greeting}[| in one word| to me][.||!]")
        return Exchange(user=restyled(rng, question), assistant=f"{capitalized(greeting)}!")
    said = rng.choice(SENTENCES) if rng.random() < 0.25 else " ".join(_any_word(rng) for _ in range(rng.randint(1, 6)))
    ask = f'[Repeat after me: {said}|Repeat: {said}|Say: {said}|Say "{said}".|Repeat "{said}"'
    ask += f"|Echo: {said}|Write the words: {said}]"
    return Exchange(user=phrase(rng, ask), assistant=said)


def _any_word(rng: Random) -> str:
    pool = rng.choice((ANIMALS, COLOURS, NAMES, SPELLED, None))
    return rng.choice(pool) if pool else made_up_word(rng)


def fact_request(rng: Random) -> Exchange:
    """ "Tell me a fact." """
    fact = rng.choice(rng.choice((FACTS["definitions"], FACTS["answers"], FACTS["places"], FACTS["planets"])))
    thing = "[a fact|something interesting|a fun fact|something new|an interesting fact]"
    ask = f"[Tell me|Give me|Do you know|I want to hear] {thing}[.|?|!|]"
    question = phrase(rng, f"[{ask}|[Teach me something.|Tell me something.|Surprise me.|Say something.]]")
    return Exchange(user=restyled(rng, question), assistant=phrase(rng, fact.answer))


ABOUT_NOUN = (
    "[I|We|They] [see|like|have found|saw|can hear] the {noun}.",
    "The {noun} is [small|big|old|beautiful|in the garden|near the river|very nice].",
    "My friend has [a good|a new|an old|a beautiful] {noun}.",
    "There is [a big|a small|an old|a nice] {noun} [near the house|in the picture|in our street].",
)


def sentence_exchange(rng: Random) -> Exchange:
    noun = made_up_word(rng) if rng.random() < 0.15 else rng.choice(SPELLED + ANIMALS)
    question = (
        f"[Write|Make|Give me|Say|Write me] a [|short |nice |simple ]sentence [about|with|with the word] {noun}[.||?]"
    )
    return Exchange(user=restyled(rng, phrase(rng, question)), assistant=phrase(rng, rng.choice(ABOUT_NOUN), noun=noun))


def spelling_exchange(rng: Random) -> Exchange:
    word = rng.choice(SPELLED + ANIMALS) if rng.random() < 0.8 else made_up_word(rng)
    if rng.random() < 0.6:
        question = phrase(
            rng, f'[Spell {word}.|How do you spell {word}?|Spell the word {word}|Can you spell "{word}"?]'
        )
        return Exchange(user=restyled(rng, question), assistant="-".join(word.upper()))
    if rng.random() < 0.5:
        question = phrase(rng, f"[What is the first letter of {word}?|What letter does {word} start with?]")
        return Exchange(user=question, assistant=f"The first letter of {word} is {word[0].upper()}.")
    letter = rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXY")
    return Exchange(
        user=restyled(rng, f"What letter comes after {letter}?"),
        assistant=f"{chr(ord(letter) + 1)} comes after {letter}.",
    )


def verse_exchange(rng: Random) -> Exchange:
    kind = rng.random()
    if kind < 0.4:
        return _verse(rng, "[haiku|haiku|short haiku]", HAIKU)
    if kind < 0.8:
        return _verse(rng, "[poem|short poem|poem|little poem|rhyme|verse]", POEMS)
    ask = (
        "[Tell me a joke.|Tell me a joke|Do you know a joke?|Make me laugh.|Say something funny.|Another joke, please."
    )
    ask += "|A joke, please.|Tell a joke]"
    return Exchange(user=restyled(rng, phrase(rng, ask)), assistant=rng.choice(JOKES))


def _verse(rng: Random, kind: str, verses: str) -> Exchange:
    topic, text = rng.choice(table(verses))
    about = f" about {topic}" if rng.random() < 0.6 else ""
    question = phrase(
        rng, f"[Write|Write me|Can you write|Give me|Please write|Compose|Tell me|Make up] a {kind}{about}[.||?]"
    )
    return Exchange(user=restyled(rng, question), assistant=text.replace(" / ", "\n"))


def reading_exchange(rng: Random) -> Exchange:
    """A question about a sentence that stands in the prompt."""
    name = made_up_word(rng).title() if rng.random() < 0.3 else rng.choice(NAMES)
    colour, animal = rng.choice(COLOURS), rng.choice(ANIMALS)
    pet = made_up_word(rng).title() if rng.random() < 0.5 else rng.choice(NAMES)
    number = rng.randint(2, 20)
    text, question, answer = rng.choice(
        (
            (f"{name} has a {colour} {animal}.", f"What colour is the {animal}?", f"The {animal} is {colour}."),
            (f"{name} has a {colour} {animal}.", f"Who has the {animal}?", f"{name} has the {animal}."),
            (f"The {animal} is called {pet}.", f"What is the name of the {animal}?", f"The {animal} is called {pet}."),
            (f"{name} lives in {pet}.", f"Where does {name} live?", f"{name} lives in {pet}."),
            (f"{name} is {number} years old.", f"How old is {name}?", f"{name} is {number} years old."),
            (
                f"{name} and {pet} went to the lake.",
                f"Where did {name} and {pet} go?",
                f"{name} and {pet} went to the lake.",
            ),
        )
    )
    return Exchange(
        user=rng.choice((f"{text} {question}", f"{text}\n{question}", f"Text: {text}\nQuestion: {question}")),
        assistant=answer,
    )


def memory_exchanges(rng: Random) -> tuple[Exchange, Exchange]:
    """What the user says of himself, and the question about it some turns later."""
    word = made_up_word(rng) if rng.random() < 0.3 else None
    match rng.randrange(4):
        case 0:
            return _introduction(rng, word.title() if word else rng.choice(NAMES))
        case 1:
            colour = rng.choice(COLOURS)
            told, question = f"My favourite colour is {colour}.", "What is my favourite colour?"
            return _remembered(rng, told, question, f"Your favourite colour is {colour}.")
        case 2:
            animal, name = rng.choice(ANIMALS), word.title() if word else rng.choice(NAMES)
            told, question = f"I have a {animal} named {name}.", f"What is the name of my {animal}?"
            return _remembered(rng, told, question, f"Your {animal} is named {name}.")
        case _:
            secret = word or rng.choice(SPELLED)
            return _remembered(rng, f"Remember this word: {secret}.", "What was the word?", f"The word was {secret}.")


def _introduction(rng: Random, name: str) -> tuple[Exchange, Exchange]:
    hello = f"[My name is {name}.|I am {name}.|Hi, I'm {name}|Hello, my name is {name}|Call me {name}.|i am {name}"
    told = phrase(rng, f"{hello}|my name is {name}]")
    offer = "[How can I help you?|What can I do for you?|]"
    reply = phrase(rng, f"[Nice to meet you, {name}!|Hello, {name}!|Hi {name}!] {offer}").strip()
    ask = "[What is my name?|What is my name?|What's my name?|Do you remember my name?|Who am I?]"
    question = restyled(rng, phrase(rng, ask))
    return Exchange(user=told, assistant=reply), Exchange(user=question, assistant=f"Your name is {name}.")


def _remembered(rng: Random, told: str, question: str, answer: str) -> tuple[Exchange, Exchange]:
    reply = phrase(rng, "[I will remember that.|Okay, I will remember that.|That is nice!|Thank you for telling me.]")
    return Exchange(user=told, assistant=reply), Exchange(user=restyled(rng, question), assistant=answer)


_TASKS: dict[Callable[[Random], Exchange], float] = {
    list_exchange: 4,
    say_exchange: 4,
    spelling_exchange: 2,
    verse_exchange: 4,
    reading_exchange: 3,
    fact_request: 1.5,
    sentence_exchange: 1,
}


def request_exchange(rng: Random) -> Exchange:
    return rng.choices(list(_TASKS), list(_TASKS.values()))[0](rng)
