"""The tables of facts, made into questions and answers.

`FACTS` maps a topic to all of its facts. A fact has several questions and a few answers, written as templates.
"""

from dataclasses import dataclass
from random import Random

from corpus import fact_sentences, fact_tables
from corpus.chat import Exchange
from corpus.phrasing import capitalized, phrase, restyled, table, with_article, words


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    question: str
    answer: str

    def exchange(self, rng: Random) -> Exchange:
        return Exchange(user=restyled(rng, phrase(rng, self.question)), assistant=phrase(rng, self.answer))


def _fact(question: str, answer: str) -> Fact:
    return Fact(question=question, answer=answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Country:
    name: str
    capital: str
    continent: str
    language: str


COUNTRIES = [
    Country(name=name, capital=capital, continent=continent, language=language)
    for name, capital, continent, language in table(fact_tables.COUNTRIES)
]


def capital_fact(country: Country) -> Fact:
    name, capital = country.name, country.capital
    return _fact(
        f"[[What is|What is|What's|Tell me|Do you know|Name] the capital [city |]of {name}?|What is {name}'s capital?"
        f"|Which city is the capital of {name}?|[c|C]apital of {name}?]",
        f"[The capital of {name} is {capital}.|The capital of {name} is {capital}."
        f"|{capital} is the capital of {name}.]",
    )


def language_fact(country: Country) -> Fact:
    name, language = country.name, country.language
    return _fact(
        f"[[What|Which] language do people speak in {name}?|[What|Which] language is spoken in {name}?"
        f"|What do they speak in {name}?]",
        f"People in {name} speak {language}.",
    )


def continent_fact(country: Country) -> Fact:
    name, continent = country.name, country.continent
    return _fact(
        f"[Where is {name}?|[What|Which] continent is {name} in?|On which continent is {name}?"
        f"|In which part of the world is {name}?]",
        f"{capitalized(name)} is in {continent}.",
    )


def _countries() -> list[Fact]:
    facts = []
    for country in COUNTRIES:
        facts += [capital_fact(country)] * 3 + [language_fact(country), continent_fact(country)]
        name, capital = country.name, country.capital
        about = f"{capitalized(name)} is in {country.continent}. The capital is {capital}, "
        about += f"and people there speak {country.language}."
        facts.append(_fact(f"[Tell me about|What is|What do you know about|Describe] {name}[.|?]", about))
        if name not in ("England", "the United Kingdom"):
            question = f"[{capital} is the capital of which country?|Which country has the capital {capital}?"
            question += f"|What country is {capital} the capital of?|Where is {capital}?|What is {capital}?"
            question += f"|Tell me about {capital}.]"
            facts.append(_fact(question, f"{capital} is the capital of {name}."))
    return facts


def _animals() -> list[Fact]:
    facts = []
    for animal, sound, young, home, legs, group, food in table(fact_tables.ANIMALS):
        one = with_article(animal)
        facts += [
            _fact(
                f"[What sound does {one} make?|What does {one} say?|How does {one} sound?]",
                f'{capitalized(one)} says "{sound}".',
            ),
            _fact(
                f"[What is a baby {animal} called?|What do you call a baby {animal}?|What is a young {animal} called?]",
                f"A baby {animal} is called {with_article(young)}.",
            ),
            _fact(
                f"[Where does {one} live?|Where do you find {one}?|What is the home of {one}?]",
                f"{capitalized(one)} lives in {home}.",
            ),
            _fact(f"How many legs does {one} have?", f"{capitalized(one)} has {legs} legs."),
            _fact(
                f"[What does {one} eat?|What do you feed {one}?|What is the food of {one}?]",
                f"{capitalized(one)} eats {food}.",
            ),
            _fact(
                f"[What kind of animal is {one}?|What is {one}?|Is {one} {with_article(group)}?]",
                f"{capitalized(one)} is {with_article(group)}.",
            ),
        ]
    return facts


def _planets() -> list[Fact]:
    facts = []
    for planet, place, known_for in table(fact_tables.PLANETS):
        facts += [
            _fact(f"[What is|Tell me about|Describe|What do you know about] {planet}?", f"{planet} is {known_for}."),
            _fact(
                f"[Which|What] is the {place} planet[| from the Sun]?",
                f"{planet} is the {place} planet from the Sun.",
            ),
        ]
    return facts


def _looks() -> list[Fact]:
    facts = []
    for thing, colour in table(fact_tables.COLOURS):
        question = (
            f"[[What|Which] colou[r|r|]r is {thing}?|What colour does {thing} have?|What is the colour of {thing}?]"
        )
        facts.append(
            _fact(question.replace("colou[r|r|]r", "[colour|colour|color]"), f"{capitalized(thing)} is {colour}.")
        )
    for one, other, mixed in table(fact_tables.MIXTURES):
        pair = f"[{one} and {other}|{other} and {one}]"
        facts.append(
            _fact(
                f"[What do you get when you mix {pair}?|What colour do {pair} make?|What is {pair} mixed together?]",
                f"{capitalized(one)} and {other} make {mixed}.",
            )
        )
    for thing, material in table(fact_tables.MATERIALS):
        facts.append(
            _fact(
                f"[What is {thing} made [of|from]?|What do you make {thing} from?]",
                f"{capitalized(thing)} is made of {material}.",
            )
        )
    return facts


def _opposites() -> list[Fact]:
    pairs = [(one, other) for one, other in table(fact_tables.OPPOSITES)]
    pairs += [(other, one) for one, other in pairs if one not in ("old", "light") and other not in ("old", "light")]
    return [
        _fact(
            f'[What is the opposite of {one}?|What\'s the opposite of "{one}"?|Opposite of {one}?'
            f"|Give me the opposite of {one}.|Which word is the opposite of {one}?]",
            f"The opposite of {one} is {other}.",
        )
        for one, other in pairs
    ]


def _places() -> list[Fact]:
    facts = []
    for sight, where in table(fact_tables.PLACES):
        verb = "are" if sight in ("the Alps", "the Andes", "the Pyramids of Giza", "Niagara Falls") else "is"
        question = f"[Where {verb} {sight}?|Where can I find {sight}?|Where can you see {sight}?]"
        facts.append(_fact(question, f"{capitalized(sight)} {verb} {where}."))
    return facts


def _people() -> list[Fact]:
    facts = [
        _fact(f"[Who {deed}?|Do you know who {deed}?]", f"{person} {deed}.")
        for deed, person in table(fact_tables.PEOPLE)
    ]
    return facts + [
        _fact(f"[Who is|Who was] {person}?", f"{person} {deed}.") for deed, person in table(fact_tables.PEOPLE)[1:]
    ]


def _jobs_and_tools() -> list[Fact]:
    facts = [
        _fact(
            f"[What does {with_article(job)} do?|What is the job of {with_article(job)}?|What is {with_article(job)}?]",
            f"{capitalized(with_article(job))} {work}.",
        )
        for job, work in table(fact_tables.JOBS)
    ]
    for tool, use in table(fact_tables.TOOLS):
        one = with_article(tool) if tool != "soap" else tool
        facts.append(
            _fact(
                f"[What is {one} [used |]for?|What do you use {one} for?|What can I do with {one}?]",
                f"You use {one} to {use}.",
            )
        )
    return facts


def _words() -> list[Fact]:
    facts = []
    for english, *foreign in table(fact_tables.WORDS):
        for language, word in zip(("French", "Spanish", "German"), foreign, strict=True):
            question = f'[How do you say "{english}" in {language}?|How do you say {english} in {language}?'
            question += f'|What is {english} in {language}?|Translate "{english}" to {language}.'
            question += f"|What is the {language} word for {english}?]"
            facts.append(_fact(question, f'"{capitalized(english)}" in {language} is "{word}".'))
    return facts


def _calendar() -> list[Fact]:
    days = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
    months = words("January February March April May June July August September October November December")
    lengths = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    seasons = words("winter winter spring spring spring summer summer summer autumn autumn autumn winter")
    facts = []
    for names, unit in ((days, "day"), (months, "month")):
        for index, name in enumerate(names):
            following, previous = names[(index + 1) % len(names)], names[index - 1]
            facts += [
                _fact(
                    f"[[What|Which] {unit} comes after {name}?|What comes after {name}?|What follows {name}?]",
                    f"{following} comes after {name}.",
                ),
                _fact(
                    f"[[What|Which] {unit} comes before {name}?|What comes before {name}?]",
                    f"{previous} comes before {name}.",
                ),
            ]
    for index, month in enumerate(months):
        leap = ", and 29 in a leap year" if month == "February" else ""
        facts += [
            _fact(
                f"[How many days does {month} have?|How many days are in {month}?]",
                f"{month} has {lengths[index]} days{leap}.",
            ),
            _fact(f"[What|Which] season is {month} in?", f"In the north, {month} is in {seasons[index]}."),
        ]
    return facts


def _definitions() -> list[Fact]:
    facts = []
    for thing, meaning in table(fact_sentences.DEFINITIONS):
        bare = thing.removeprefix("a ").removeprefix("an ").removeprefix("the ")
        ask = "[What is|What is|What's|Explain|Define|Tell me about|What do you know about]"
        question = f"{ask} {thing}?|Explain {thing} to me."
        if thing != bare and not thing.startswith("the "):
            plural = f"{bare[:-1]}ies" if bare.endswith("y") else f"{bare}s"
            question += f"|What are {plural}?|Tell me about {plural}.|Tell me about the {bare}."
        facts.append(_fact(f'[{question}|Explain {thing}.|What does the word "{bare}" mean?]', meaning))
    return facts


def _answers() -> list[Fact]:
    rows = (line.rsplit("|", 1) for line in fact_sentences.ANSWERS.strip().splitlines())
    return [_fact(question, answer) for question, answer in rows]


FACTS: dict[str, list[Fact]] = {
    "countries": _countries(),
    "animals": _animals(),
    "planets": _planets(),
    "looks": _looks(),
    "opposites": _opposites(),
    "places": _places(),
    "people": _people(),
    "jobs and tools": _jobs_and_tools(),
    "words": _words(),
    "calendar": _calendar(),
    "definitions": _definitions(),
    "answers": _answers(),
}
_WEIGHTS = [len(facts) ** 0.8 for facts in FACTS.values()]


def fact_exchange(rng: Random) -> Exchange:
    topic = rng.choices(list(FACTS.values()), _WEIGHTS)[0]
    return rng.choice(topic).exchange(rng)
