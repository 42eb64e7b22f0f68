"""Trains the demo model from nothing: writes the text, learns a tokenizer, trains a small Llama, saves a checkpoint.

    python deploy/demo_model/train.py

Everything is drawn from one seed. The first steps use short rows (cheap), the last ones long rows, so that the model
also holds a conversation. Every document is drawn afresh; the held-out text comes from another seed.
"""

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from corpus import documents
from corpus.chat import DOCUMENT_END, TURN_END, TURN_START
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from training_curve import draw
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from vocabulary import save_tokenizer, train_tokenizer

HERE = Path(__file__).parent
BATCH_TOKENS = 2048
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 150
IGNORED = -100
EVALUATE_EVERY = 200
HELD_OUT_LENGTH, NUM_HELD_OUT_BATCHES = 256, 16
LOG_COLUMNS = ("step", "tokens", "train_loss", "held_out_loss", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the training with rows of one length, and the attention that is fastest there (measured on a CPU)."""

    fraction: float
    length: int
    attention: str


PHASES = (
    Phase(fraction=0.8, length=256, attention="eager"),
    Phase(fraction=0.12, length=512, attention="eager"),
    Phase(fraction=0.08, length=1024, attention="sdpa"),
)


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """An answer ends with its turn, a completion with its document."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[TURN_END], vocabulary[DOCUMENT_END]]


def model_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_ids(tokenizer),
        pad_token_id=tokenizer.token_to_id(DOCUMENT_END),
    )


def labels_of(ids: list[int], vocabulary: dict[str, int]) -> list[int]:
    """What there is to learn: plain text, and the assistant's turns of a conversation (to answer, not to ask)."""
    turn_start, assistant = vocabulary[TURN_START], vocabulary["assistant"]
    labels: list[int] = []
    learned = True
    for position, token in enumerate(ids):
        if token == turn_start:
            learned = ids[position + 1] == assistant
        labels.append(token if learned and token != turn_start else IGNORED)
    return labels


def token_rows(tokenizer: Tokenizer, seed: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels. Each row begins with the beginning of a document, as a prompt does; its last one is cut."""
    vocabulary = tokenizer.get_vocab()
    stream = documents(seed)
    ids: list[int] = []
    labels: list[int] = []
    while True:
        for encoding in tokenizer.encode_batch(list(islice(stream, 256))):
            ids += encoding.ids
            labels += labels_of(encoding.ids, vocabulary)
            if len(ids) >= length:
                yield ids[:length], labels[:length]
                ids, labels = [], []


def batches(rows: Iterator[tuple[list[int], list[int]]], length: int) -> Iterator[Tensor]:
    """Ids and labels as one tensor of shape [2, rows, length]."""
    while True:
        ids, labels = zip(*islice(rows, BATCH_TOKENS // length), strict=True)
        yield torch.tensor([ids, labels])


def phase_batches(model: LlamaForCausalLM, tokenizer: Tokenizer, num_steps: int, seed: int) -> Iterator[Tensor]:
    num_done, fraction = 0, 0.0
    for index, phase in enumerate(PHASES):
        fraction += phase.fraction
        num_until = round(num_steps * fraction)
        model.set_attn_implementation(phase.attention)
        rows = token_rows(tokenizer, seed + 1 + index, phase.length)
        yield from islice(batches(rows, phase.length), num_until - num_done)
        num_done = num_until


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    ids, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: list[Tensor]) -> float:
    model.eval()
    loss = sum(next_token_loss(model, batch).item() for batch in held_out) / len(held_out)
    model.train()
    return loss


def learning_rate(step: int, num_steps: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, num_steps: int, seed: int, log_path: Path) -> None:
    optimizer = optimizer_for(model)
    held_out_rows = token_rows(tokenizer, seed + 1000, HELD_OUT_LENGTH)
    held_out = list(islice(batches(held_out_rows, HELD_OUT_LENGTH), NUM_HELD_OUT_BATCHES))
    started = time.monotonic()
    recent: list[float] = []
    with log_path.open("w", newline="") as log_file, tqdm(total=num_steps, unit="step") as progress:
        log = csv.writer(log_file)
        log.writerow(LOG_COLUMNS)
        for step, batch in enumerate(phase_batches(model, tokenizer, num_steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            loss = next_token_loss(model, batch)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            progress.update()
            progress.set_postfix(loss=f"{recent[-1]:.3f}")
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == num_steps:
                held = held_out_loss(model, held_out)
                mean, seconds = sum(recent) / len(recent), time.monotonic() - started
                log.writerow((step + 1, (step + 1) * BATCH_TOKENS, f"{mean:.4f}", f"{held:.4f}", f"{seconds:.0f}"))
                log_file.flush()
                recent.clear()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    settings = {"eos_token_id": end_ids(tokenizer), "pad_token_id": tokenizer.token_to_id(DOCUMENT_END)}
    model.generation_config = GenerationConfig.from_dict(settings)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder for the checkpoint")
    parser.add_argument("--log", type=Path, default=HERE, help="folder for training_log.csv and training_curve.png")
    parser.add_argument("--steps", type=int, default=4000, help=f"optimizer steps of {BATCH_TOKENS} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="2 is faster, but only if both cores are free")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    print(f"{model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens in the vocabulary")
    arguments.out.mkdir(parents=True, exist_ok=True)
    log_path = arguments.log / "training_log.csv"
    train(model, tokenizer, arguments.steps, arguments.seed, log_path)
    save(model, tokenizer, arguments.out)
    draw(log_path, arguments.log / "training_curve.png")


if __name__ == "__main__":
    main()
