"""Exchanges strung together into conversations, with follow-ups that need what was said before."""

from collections.abc import Callable
from random import Random

from corpus.arithmetic import addition_chain, arithmetic_exchange
from corpus.chat import Exchange, render, system_prompt
from corpus.facts import COUNTRIES, Country, Fact, capital_fact, continent_fact, fact_exchange, language_fact
from corpus.phrasing import phrase
from corpus.requests import memory_exchanges, request_exchange
from corpus.small_talk import about_exchange, farewell, greeting
from corpus.stories import story_exchange, story_follow_up
from corpus.unknowns import unknown_exchange


def _story(rng: Random) -> list[Exchange]:
    exchange, told = story_exchange(rng)
    exchanges = [exchange]
    if rng.random() < 0.2:
        exchanges.append(story_follow_up(rng, told))
    return exchanges


def _country_chain(rng: Random) -> list[Exchange]:
    """ "What is the capital of France?" "And Spain?" "What language do they speak there?" """
    ask_about: Callable[[Country], Fact] = rng.choice((capital_fact, capital_fact, language_fact, continent_fact))
    countries = rng.sample(COUNTRIES, rng.randint(2, 3))
    exchanges = [ask_about(countries[0]).exchange(rng)]
    for country in countries[1:]:
        name = country.name
        question = phrase(rng, f"[And {name}?|And of {name}?|What about {name}?|and {name}|{name}?]")
        exchanges.append(Exchange(user=question, assistant=ask_about(country).exchange(rng).assistant))
    if rng.random() < 0.4:
        last = countries[-1]
        ask = "[What language do they speak there?|And what language do they speak?|Which language is spoken there?]"
        exchanges.append(Exchange(user=phrase(rng, ask), assistant=language_fact(last).answer))
    return exchanges


def _single(make: Callable[[Random], Exchange]) -> Callable[[Random], list[Exchange]]:
    return lambda rng: [make(rng)]


_PARTS: dict[Callable[[Random], list[Exchange]], float] = {
    _single(fact_exchange): 50,
    _single(arithmetic_exchange): 18,
    _single(request_exchange): 16,
    _single(unknown_exchange): 10,
    _single(about_exchange): 8,
    _country_chain: 3,
    addition_chain: 2,
    _story: 3,
}


def _part(rng: Random) -> list[Exchange]:
    return rng.choices(list(_PARTS), list(_PARTS.values()))[0](rng)


def conversation(rng: Random) -> str:
    """One or several exchanges about anything, perhaps with a hello and a goodbye."""
    exchanges = [greeting(rng)] if rng.random() < 0.15 else []
    remembered = None
    if rng.random() < 0.06:
        told, remembered = memory_exchanges(rng)
        exchanges.append(told)
    for _ in range(rng.choices((1, 2, 3, 4, 5), (50, 22, 14, 9, 5))[0]):
        exchanges += _part(rng)
    if remembered is not None:
        exchanges.append(remembered)
    if rng.random() < 0.12:
        exchanges.append(farewell(rng))
    return render(exchanges, system=system_prompt(rng))


def greeting_only(rng: Random) -> str:
    make = greeting if rng.random() < 0.7 else farewell
    return render([make(rng)], system=system_prompt(rng))


def story_conversation(rng: Random) -> str:
    exchanges = [greeting(rng)] if rng.random() < 0.05 else []
    exchanges += _story(rng)
    if rng.random() < 0.1:
        exchanges += _story(rng)
    if rng.random() < 0.1:
        exchanges.append(farewell(rng))
    return render(exchanges, system=system_prompt(rng))
