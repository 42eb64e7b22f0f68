"""`audible_checkpoint`: a random checkpoint whose every token has text, so that a client can see every token.

Random models draw single bytes that are no whole character more often than others: for such a token a server has
nothing to write, and to the client it looks as if the token were late.
"""

import json
from pathlib import Path

NUM_BYTES = 256


def audible_checkpoint(folder: Path, checkpoint: Path) -> Path:
    """Links to `checkpoint` in `folder`, words for bytes outside ASCII; `checkpoint` where it is not random."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    if tokenizer["model"].get("merges") != []:  # only the tokenizers of `engine.random_tokenizer` have no merge at all
        return checkpoint
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        f"byte{token_id}" if token_id < NUM_BYTES and not piece.isascii() else piece: token_id
        for piece, token_id in vocabulary.items()
    }
    for file in checkpoint.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).symlink_to(file)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
