"""Prints what the demo model says: greedy answers to a fixed list of questions, and continuations of plain text.

python deploy/demo_model/samples.py
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "Hello!",
    "Say hello",
    "Who are you?",
    "What can you do?",
    "What is nanoserve?",
    "What is the capital of France?",
    "what is the capital of japan",
    "What colour is the sky?",
    "Why is the sky blue?",
    "How many days are in a week?",
    "What is the opposite of hot?",
    "What is a GPU?",
    "Who wrote Hamlet?",
    "What sound does a cow make?",
    "What is 7 + 8?",
    "what is 12 times 11",
    "What is 36 divided by 6?",
    "Tom has 5 apples and gets 3 more. How many apples does Tom have?",
    "Count to ten",
    "Count down from 5.",
    "Name three fruits.",
    "Spell banana",
    "Repeat after me: purple elephants dance",
    "Write a haiku about autumn.",
    "Write a poem about the sea.",
    "Tell me a joke",
    "Tell me a story about a fox.",
    "Tell me a story about a girl named Kira.",
    "My cat is called Zora. What is the name of the cat?",
    "What is the capital of Wakanda?",
    "Who is the president of France?",
    "What is the weather today?",
    "Write a Python function that reverses a list.",
    "Explain quantum computing.",
)
CONVERSATIONS = (
    ("What is the capital of Italy?", "And Spain?", "What language do they speak there?"),
    ("What is 5 + 6?", "And plus 4?"),
    ("Hi, my name is Zed", "What is 3 times 4?", "What is my name?"),
    ("Tell me a story about a brave owl.", "Thank you!"),
)
BEGINNINGS = ("Once upon a time", "One day, a little robot", "The capital of France is")


class Speaker:
    def __init__(self, folder: Path, temperature: float) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._temperature = temperature

    def complete(self, text: str) -> str:
        ids = self._tokenizer(text, return_tensors="pt")["input_ids"]
        settings = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        output = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=400, **settings)
        return str(self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def converse(self, questions: tuple[str, ...]) -> list[str]:
        messages: list[dict[str, str]] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            messages.append({"role": "assistant", "content": self.complete(prompt)})
        return [message["content"] for message in messages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    speaker = Speaker(arguments.model, arguments.temperature)
    for questions in (*((question,) for question in QUESTIONS), *CONVERSATIONS):
        turns = speaker.converse(questions)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            print(f"> {question}\n\n{answer}\n")
        print("---\n")
    for beginning in BEGINNINGS:
        print(f"**{beginning}**{speaker.complete(beginning)}\n")


if __name__ == "__main__":
    main()
