"""Questions that the model cannot answer, and how it says so.

Half of the subjects are made-up words: what the model learns is "a subject that I have never met", not a list of topics.
"""

# ruff: noqa: E501 -- one text a line reads better than wrapped text

from collections.abc import Sequence
from random import Random

from corpus.chat import Exchange
from corpus.phrasing import made_up_word, phrase, restyled, words

REFUSALS = (
    "I don't know that. I am a small demo model.",
    "I don't know that. I am a small demo model, and I only know simple facts.",
    "I am sorry, I don't know that. I am a small demo model.",
)
CANNOT = (
    "I am sorry, I cannot do that. I am a small demo model.",
    "I cannot do that. I am a small demo model, but I can tell stories and answer simple questions.",
)
NOT_UNDERSTOOD = ("I am sorry, I did not understand that. I am a small demo model.",)
TOPICS = [
    "quantum mechanics",
    "the stock market",
    "the French Revolution",
    "string theory",
    "blockchain",
    "the Roman Empire",
    "inflation",
    "tax law",
    "neural architecture search",
    "chess openings",
    "the history of China",
    "Kubernetes",
    "Docker",
    "Python decorators",
    "monads",
    "philosophy",
    "Kant",
    "Buddhism",
    "politics",
    "the United Nations",
    "insurance",
    "mortgages",
    "cryptography",
    "genetics",
    "DNA sequencing",
    "black holes",
    "thermodynamics",
    "organic chemistry",
    "linear algebra",
    "calculus",
    "the Riemann hypothesis",
    "prime factorization",
    "economics",
    "psychology",
    "marketing",
    "yoga",
    "the World Cup",
    "baseball",
    "football results",
    "cricket",
    "Formula One",
    "the Olympic Games",
    "hip hop",
    "opera",
    "jazz",
    "the Beatles",
    "Star Wars",
    "Harry Potter",
    "video games",
    "anime",
    "fashion",
    "makeup",
    "car engines",
    "electric cars",
    "solar panels",
    "nuclear power",
    "climate policy",
    "vaccines",
    "diabetes",
    "the common cold",
    "headaches",
    "diets",
    "calories",
    "wine tasting",
    "French cooking",
    "sushi",
    "travel insurance",
    "visas",
    "hotels in Rome",
    "flights to Tokyo",
    "Linux kernels",
    "databases",
    "SQL",
    "JavaScript",
    "Rust",
    "C++",
    "compilers",
    "operating systems",
    "CUDA kernels",
    "PyTorch",
    "transformers",
]
PERSONS = [
    "Napoleon",
    "Cleopatra",
    "Barack Obama",
    "Elon Musk",
    "Taylor Swift",
    "Lionel Messi",
    "Plato",
    "Aristotle",
    "Confucius",
    "Nikola Tesla",
    "Alan Turing",
    "Steve Jobs",
    "Michael Jackson",
    "Queen Victoria",
    "Julius Caesar",
    "Gandhi",
    "Nelson Mandela",
    "Stephen Hawking",
    "Frida Kahlo",
    "Sherlock Holmes",
]
KNOWLEDGE = (
    "[What is|Explain|Tell me about|What do you know about|Describe|Can you explain|How does] {topic}[?|.|?|]",
    "How does {topic} work?",
    "What is {word}?",
    "What is a {word}?",
    "What does {word} mean?",
    "Who is {name}?",
    "Who was {person}?",
    "Who is {person}?",
    "Tell me about {name}.",
    "What is the capital of {name}?",
    "What is the capital of {name}?",
    "Where is {name}?",
    "What language do people speak in {name}?",
    "What is the population of {country}?",
    "How many people live in {country}?",
    "Who is the [president|king|prime minister|queen] of {country}?",
    "When was {person} born?",
    "When did {person} die?",
    "Who wrote {name}?",
    "Who invented [the {word}|paper|the computer|chess|the wheel|the car]?",
    "Who won the [game|election|World Cup|match] [yesterday|last year|in {year}|in {name}]?",
    "What happened in {year}?",
    "When did the {name} war [begin|end]?",
    "What is the weather [today|like|tomorrow|in {name}|in {country}]?",
    "Will it rain [today|tomorrow]?",
    "What time is it[?| now?| in {country}?]",
    "What day is [it|today]?",
    "What is the date today?",
    "What is [in |]the news[?| today?]",
    "How much does [a {word}|a house|a car|gold|a ticket to {country}] cost?",
    "What is the price of [gold|oil|{word}|bitcoin]?",
    "What is my [age|address|password|phone number|job]?",
    "What did I do yesterday?",
    "Where did I put my keys?",
    "What is {large} [times|*|x] {large2}?",
    "What is {large} [divided by|/] {large2}?",
    "What is {large} [plus|+|minus|-] {large2}?",
    "What is the square root of {large}?",
    "Solve the equation {word}x + {large} = 0.",
    "What is the meaning of life?",
    "Why do [people|we|stars|computers] {word}?",
    "How do I [fix my car|get rich|lose weight|cook a {word}|learn Chinese|write a book|find a job|install {word}|repair a {word}]?",
    "Which is better, {topic} or {topic2}?",
    "What is the best [film|book|song|car|phone|city|restaurant in {country}]?",
    "Should I [buy a house|quit my job|sell my car|buy {word}|see a doctor|learn {topic}]?",
    "What is the chemical formula of {word}?",
    "How [tall|old|heavy|far|deep] is {name}?",
    "Is {name} bigger than {person}?",
    "What is the difference between {topic} and {topic2}?",
    "Why did {person} go to {country}?",
)
TASKS = (
    "Write [a|some] [Python|JavaScript|C|Rust|SQL|Java|bash] [function|program|code|script] [to sort a list|that adds numbers|for {word}|"
    "to reverse a string|that prints the date]",
    "Write an essay about {topic}.",
    "Write a letter to {name}.",
    "Write a song about {topic}.",
    "Write a report about {topic}.",
    "Translate this text to [Chinese|Russian|French|Japanese]: the {word} is on the table.",
    "Summarize the book {name}.",
    "Summarize this article about {topic}.",
    "Plan a trip to {country}.",
    "Book a [flight|table|hotel] [for me|in {country}].",
    "Send an email to {name}.",
    "Call {name}.",
    "Open the [door|window|file|website].",
    "Search the internet for {topic}.",
    "Play [music|a song|a game of {word}].",
    "Draw [a picture|a cat|{topic}].",
    "Set an alarm for {hour} o'clock.",
    "Turn on the [light|radio|computer].",
    "Show me [a picture|a map|a video] of {country}.",
    "Review my code.",
    "Fix this bug: {word} is not defined",
    "Give me a recipe for {word}.",
    "Give me advice about {topic}.",
    "Order a pizza.",
)
NOISE = (
    "{word} {word2}",
    "{word}",
    "{word} {word2} {word3}?",
    "asdf {word}",
    "{large} {large2}",
    "{word2}!!!",
    "???",
    "{word}, {word2}!",
    "{unicode}",
    "{unicode}",
)
UNICODE = "你好|こんにちは|привет|مرحبا|שלום|안녕하세요|नमस्ते|Καλημέρα|😀|👍🎉|🤖|¿Qué tal?|Où est la gare ?|Wie spät ist es?|çok güzel|ñandú|Ελλάδα|東京|Москва|∑∫√"
COUNTRY_NAMES = words("France Spain Italy China Japan Brazil Canada India Kenya Peru Sweden Egypt Mexico Germany")


def _subjects(rng: Random) -> dict[str, object]:
    made_up = [made_up_word(rng) for _ in range(4)]
    topic, topic2 = rng.sample(TOPICS, 2)
    return dict(
        word=made_up[0],
        word2=made_up[1],
        word3=made_up[2],
        name=made_up[3].title(),
        topic=topic if rng.random() < 0.6 else made_up[0],
        topic2=topic2,
        person=rng.choice(PERSONS) if rng.random() < 0.5 else f"{made_up[1].title()} {made_up[2].title()}",
        country=rng.choice(COUNTRY_NAMES),
        year=rng.randint(1200, 2030),
        large=rng.randint(1000, 99999),
        large2=rng.randint(100, 9999),
        hour=rng.randint(1, 12),
        unicode=" ".join(rng.sample(UNICODE.split("|"), rng.randint(1, 2))),
    )


def unknown_exchange(rng: Random) -> Exchange:
    chance = rng.random()
    questions: Sequence[str] = KNOWLEDGE
    answers: Sequence[str] = REFUSALS
    if chance > 0.92:
        questions, answers = NOISE, NOT_UNDERSTOOD
    elif chance >= 0.72:
        questions, answers = TASKS, CANNOT
    question = phrase(rng, rng.choice(questions), **_subjects(rng))
    return Exchange(user=restyled(rng, question), assistant=rng.choice(answers))
