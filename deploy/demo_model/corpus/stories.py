"""Short stories: a cast, a plot, and a way to ask for them.

The `Cast` is drawn first and the plot is told with it, so a request ("a story about a shy fox") and the story agree.
"""

from dataclasses import dataclass
from random import Random

from corpus.chat import DOCUMENT_END, Exchange
from corpus.phrasing import capitalized, made_up_word, phrase, restyled, with_article
from corpus.story_plots import (
    ADJECTIVES,
    ANIMALS,
    BOYS,
    COLOURS,
    ENDINGS,
    FEARS,
    FOODS,
    FRIEND_INTRODUCTIONS,
    GIRLS,
    OPENINGS,
    PEOPLE,
    PLACES,
    PLANTS,
    PLOTS,
    PROJECTS,
    SKILLS,
    THINGS,
    Plot,
)

PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    text: str
    plot: Plot
    values: dict[str, str]


def story(rng: Random) -> Story:
    plot = rng.choice(PLOTS)
    values = _cast(rng)
    body = [phrase(rng, step, **values) for step in plot.steps]
    if len(body) > 5 and rng.random() < 0.25:
        del body[-1]
    sentences = [phrase(rng, rng.choice(OPENINGS), **values), *body, phrase(rng, rng.choice(ENDINGS), **values)]
    if rng.random() < 0.15:
        sentences.append(phrase(rng, "[The moral of the story is:|And so we learn:] {moral}.", moral=plot.moral))
    if rng.random() < 0.3:
        middle = rng.randrange(2, len(sentences) - 1)
        return Story(
            text=" ".join(sentences[:middle]) + "\n\n" + " ".join(sentences[middle:]), plot=plot, values=values
        )
    return Story(text=" ".join(sentences), plot=plot, values=values)


def _name(rng: Random, pronoun: str) -> str:
    if rng.random() < 0.1:
        return made_up_word(rng).title()
    return rng.choice(BOYS if pronoun == "he" else GIRLS)


def _kind(rng: Random) -> str:
    if rng.random() < 0.03:
        return made_up_word(rng)
    return rng.choice(ANIMALS) if rng.random() < 0.75 else rng.choice(tuple(PEOPLE))


def _cast(rng: Random) -> dict[str, str]:
    kind, friend_kind = _kind(rng), _kind(rng)
    he, him, his = PRONOUNS[PEOPLE.get(kind) or rng.choice(("he", "she"))]
    friend_he, friend_him, _ = PRONOUNS[PEOPLE.get(friend_kind) or rng.choice(("he", "she"))]
    name = friend = _name(rng, he)
    while friend == name:
        friend = _name(rng, friend_he)
    adjective, colour, project = rng.choice(ADJECTIVES), rng.choice(COLOURS), rng.choice(PROJECTS)
    values = dict(name=name, kind=kind, he=he, him=him, his=his, He=he.title(), His=his.title())
    values |= dict(friend=friend, friend_kind=friend_kind, friend_he=friend_he)
    values |= dict(friend_him=friend_him, adjective=adjective, a_adjective=with_article(adjective), colour=colour)
    values |= dict(a_colour=with_article(colour), a_kind=with_article(kind), a_friend_kind=with_article(friend_kind))
    thing = rng.choice(THINGS)
    values |= dict(
        place=rng.choice(PLACES),
        thing=thing,
        a_thing=with_article(thing),
        food=rng.choice(FOODS),
        skill=rng.choice(SKILLS),
    )
    values |= dict(
        fear=rng.choice(FEARS), plant=rng.choice(PLANTS), project=project, project_the=project.replace("a ", "the ", 1)
    )
    values["friend_intro"] = phrase(rng, rng.choice(FRIEND_INTRODUCTIONS), **values)
    values["friend_intro_start"] = capitalized(values["friend_intro"])
    return values


def plain_story(rng: Random) -> str:
    """For text completion: no chat format, and an end of document where the story ends."""
    told = story(rng)
    title = f"{_title(rng, told)}\n\n" if rng.random() < 0.15 else ""
    return title + told.text + DOCUMENT_END


def _title(rng: Random, told: Story) -> str:
    topic = phrase(rng, rng.choice(told.plot.topics), **told.values)
    name, kind = told.values["name"], told.values["kind"]
    return rng.choice(
        (
            f"{name} the {kind.title()}",
            f"The {kind.title()} and the {told.values['friend_kind'].title()}",
            capitalized(topic),
        )
    )


REQUESTS = (
    "[Tell me|Write|Please tell me|Write me|Can you tell me|Can you write|I want|Make up|Give me|Could you tell me]"
    " a [story|story|story|short story|little story|bedtime story|nice story] about {subject}[.|.|?|]"
)
SUBJECTS = (
    "{a_kind}",
    "{a_kind}",
    "{a_kind}",
    "{a_kind}",
    "{a_adjective} {kind}",
    "{a_adjective} {kind} named {name}",
    "{a_kind} named {name}",
    "{a_kind} called {name}",
    "{name}",
    "{a_kind} and {a_friend_kind}",
    "{name} and {friend}",
    "{name} the {kind}",
    "{a_kind} in {place}",
    "{a_kind} who has {a_colour} {thing}",
)
OPEN_REQUESTS = (
    "[Tell me a story.|Tell me a story|Can you tell me a story?|Write a short story.|I want to hear a story."
    "|Story please!|Please tell me a bedtime story.|Tell me something nice.|Do you know a story?|Once upon a time"
    "|I can't sleep. Tell me a story.|Make up a story.|Write a story.|Tell a story|Another story, please.]"
)
INTRODUCTION = (
    "[Here is a story.|Sure!|Of course!|Here is a story for you.|Sure, here is a story about {subject}.|Okay!]\n\n"
)


def story_exchange(rng: Random) -> tuple[Exchange, Story]:
    told = story(rng)
    chance = rng.random()
    if chance < 0.12:
        subject, question = "", phrase(rng, OPEN_REQUESTS)
    else:
        choices = told.plot.topics if chance < 0.35 else SUBJECTS
        subject = phrase(rng, rng.choice(choices), **told.values)
        question = phrase(rng, REQUESTS, subject=subject)
    text = told.text
    if subject and rng.random() < 0.2:
        text = phrase(rng, INTRODUCTION, subject=subject) + text
    return Exchange(user=restyled(rng, question), assistant=text), told


FOLLOW_UPS = (
    ("What was the name of the {kind}[?|]", "The {kind} was named {name}."),
    ("[Who|What] was {name}[?|]", "{name} was {a_adjective} {kind} who lived in {place}."),
    ("Who was {friend}[?|]", "{friend} was {a_friend_kind}."),
    ("Where did {name} live[?|]", "{name} lived in {place}."),
    ("What is the moral of the story[?|]", "The moral is: {moral}."),
    (
        "[I like it!|That was nice.|Nice story!|Great story, thank you!|I loved that.]",
        "[I am glad you liked it|Thank you]! [Would you like to hear another one?|I like {name}, too.]",
    ),
)


def story_follow_up(rng: Random, told: Story) -> Exchange:
    values = told.values | {"moral": told.plot.moral}
    question, answer = rng.choice(FOLLOW_UPS)
    return Exchange(user=phrase(rng, question, **values), assistant=phrase(rng, answer, **values))
