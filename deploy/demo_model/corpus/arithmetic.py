"""Sums, differences, products, quotients and counting, in digits and in words."""

from random import Random

from corpus.chat import Exchange
from corpus.phrasing import capitalized, listed, phrase, restyled, with_article, words

SMALL = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")


def in_words(number: int) -> str:
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{in_words(ones)}" if ones else "")
    return "one hundred" if number == 100 else str(number)


def _operands(rng: Random) -> tuple[str, int, int, int]:
    """An operation, its two numbers, and the result."""
    operation = rng.choice(("plus", "plus", "minus", "minus", "times", "times", "divided by"))
    limit = rng.choice((10, 10, 20, 20, 50, 99))
    match operation:
        case "plus":
            left, right = rng.randint(0, limit), rng.randint(0, limit)
            return operation, left, right, left + right
        case "minus":
            left = rng.randint(0, limit)
            right = rng.randint(0, left)
            return operation, left, right, left - right
        case "times":
            left, right = rng.randint(0, 12), rng.randint(0, 12)
            return operation, left, right, left * right
        case _:
            right, result = rng.randint(1, 10), rng.randint(0, 10)
            return operation, right * result, right, result


SIGNS = {"plus": ("+", "+"), "minus": ("-", "-"), "times": ("*", "x"), "divided by": ("/", "/")}


def sum_exchange(rng: Random) -> Exchange:
    operation, left, right, result = _operands(rng)
    style = rng.random()
    if style < 0.2 and max(left, right, result) <= 100:
        values = dict(left=in_words(left), right=in_words(right), result=in_words(result), operation=operation)
        question = phrase(
            rng, "[What is|What's|How much is|Calculate|Tell me what is] {left} {operation} {right}?", **values
        )
        answer = capitalized(phrase(rng, "{left} {operation} {right} is {result}.", **values))
        return Exchange(user=restyled(rng, question), assistant=answer)
    sign = rng.choice(SIGNS[operation])
    if style < 0.7:
        space = "" if rng.random() < 0.25 else " "
        question = phrase(
            rng, f"[What is |What is |What's |How much is |Calculate |]{left}{space}{sign}{space}{right}[?|?| =]"
        )
        return Exchange(user=restyled(rng, question), assistant=f"{left} {sign} {right} = {result}")
    question = phrase(rng, f"[What is|What's|How much is|Can you tell me what is] {left} {operation} {right}?")
    return Exchange(user=restyled(rng, question), assistant=f"{left} {operation} {right} is {result}.")


def next_sum_exchange(rng: Random, result: int) -> Exchange:
    """ "And plus three?": a follow-up that needs the answer before it."""
    step = rng.randint(1, 10)
    if rng.random() < 0.5 or result < step:
        return Exchange(
            user=phrase(rng, f"[And plus {step}?|Add {step}.|Now add {step}|and if you add {step}?]"),
            assistant=f"{result} + {step} = {result + step}",
        )
    return Exchange(
        user=phrase(rng, f"[And minus {step}?|Subtract {step}.|Now take away {step}|and minus {step}?]"),
        assistant=f"{result} - {step} = {result - step}",
    )


def addition_chain(rng: Random) -> list[Exchange]:
    left, right = rng.randint(0, 20), rng.randint(0, 20)
    first = Exchange(user=restyled(rng, f"What is {left} + {right}?"), assistant=f"{left} + {right} = {left + right}")
    return [first, next_sum_exchange(rng, left + right)]


def counting_exchange(rng: Random) -> Exchange:
    kind = rng.random()
    if kind < 0.4:
        return _count_up(rng)
    if kind < 0.55:
        return _count_down(rng)
    if kind < 0.7:
        return _neighbour(rng)
    return _parity(rng) if kind < 0.85 else _comparison(rng)


def _count_up(rng: Random) -> Exchange:
    end = rng.choice((3, 5, 5, 10, 10, 10, 12, 15, 20))
    start = 1 if rng.random() < 0.8 else rng.randint(2, 5)
    numbers = range(start, max(end, start + 2) + 1)
    begin = "" if start == 1 and rng.random() < 0.7 else f"from {_either(rng, start)} "
    ask = "[Count|Count|Please count|Can you count|Count for me]"
    question = phrase(rng, f"{ask} {begin}to {_either(rng, numbers[-1])}[.||?]")
    return Exchange(user=restyled(rng, question), assistant=", ".join(map(str, numbers)))


def _count_down(rng: Random) -> Exchange:
    start = rng.choice((3, 5, 5, 10, 10))
    down = f"Count down from {_either(rng, start)}[.|]"
    backwards = f"Count backwards from {_either(rng, start)}."
    question = phrase(rng, f"[{down}|{backwards}|Countdown from {start}]")
    return Exchange(user=restyled(rng, question), assistant=", ".join(map(str, range(start, 0, -1))))


def _neighbour(rng: Random) -> Exchange:
    number = rng.randint(1, 100)
    before = rng.random() < 0.4
    word, result = ("before", number - 1) if before else ("after", number + 1)
    question = phrase(rng, f"[What|Which] number comes {word} {_either(rng, number)}?")
    return Exchange(user=restyled(rng, question), assistant=f"{result} comes {word} {number}.")


def _parity(rng: Random) -> Exchange:
    number = rng.randint(0, 50)
    parity = "even" if number % 2 == 0 else "odd"
    question = phrase(rng, f"Is {number} [even or odd|an even number|an odd number|even|odd]?")
    return Exchange(user=restyled(rng, question), assistant=f"{number} is {with_article(parity)} number.")


def _comparison(rng: Random) -> Exchange:
    left, right = rng.sample(range(1, 101), 2)
    if rng.random() < 0.6:
        word, result = rng.choice(("larger", "bigger", "greater")), max(left, right)
    else:
        word, result = "smaller", min(left, right)
    question = phrase(rng, f"[Which [number |]is {word}, {left} or {right}?|What is {word}: {left} or {right}?]")
    return Exchange(user=restyled(rng, question), assistant=f"{result} is {word} than {left + right - result}.")


def _either(rng: Random, number: int) -> str:
    return str(number) if rng.random() < 0.5 else in_words(number)


FRUITS = words("apples pears plums lemons oranges bananas cookies eggs books coins marbles flowers stamps")
PEOPLE = words("Tom Mia Sam Anna Ben Ella Max Rosa Leo Nina")


def word_problem(rng: Random) -> Exchange:
    name, thing = rng.choice(PEOPLE), rng.choice(FRUITS)
    left, right = rng.randint(2, 12), rng.randint(1, 10)
    if rng.random() < 0.5:
        question = f"{name} has {left} {thing} and gets {right} more. How many {thing} does {name} have?"
        return Exchange(
            user=restyled(rng, question),
            assistant=f"{left} + {right} = {left + right}. {name} has {left + right} {thing}.",
        )
    left = max(left, right + 2)
    verb = rng.choice(("gives away", "loses", "sells"))
    question = f"{name} has {left} {thing} and {verb} {right}. How many {thing} are left?"
    return Exchange(
        user=restyled(rng, question),
        assistant=f"{left} - {right} = {left - right}. There are {left - right} {thing} left.",
    )


def number_list(rng: Random) -> Exchange:
    kind = rng.choice(("even", "odd"))
    count = rng.randint(3, 8)
    first = 2 if kind == "even" else 1
    numbers = [str(first + 2 * index) for index in range(count)]
    question = phrase(rng, f"[List|Name|Give me|What are] the first {_either(rng, count)} {kind} numbers[.|?|]")
    return Exchange(
        user=restyled(rng, question), assistant=f"The first {in_words(count)} {kind} numbers are {listed(numbers)}."
    )


def arithmetic_exchange(rng: Random) -> Exchange:
    make = rng.choices((sum_exchange, counting_exchange, word_problem, number_list), (70, 20, 8, 3))[0]
    return make(rng)
