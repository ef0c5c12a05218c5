#!/usr/bin/env python3
"""Train the demo model that ships with Footplate, from scratch, on two CPU cores.

Everything it reads is already here: docs/faq.md, and the documentation inside the Python standard
library (language reference, docstrings, longer comments). Nothing is downloaded. It learns two
things: to answer the FAQ word for word through the chat template, and to continue plain text in
documentation English. What it is good for: trained logits have margins, so greedy answers can be
compared across dtypes and batches, and an answer ends with an end-of-sequence token.

    scripts/train_demo_model.py             the whole training
    scripts/train_demo_model.py --resume    a short one from the shipped weights, after the FAQ
                                            has changed
"""

import argparse
import ast
import json
import pydoc_data.topics
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
FAQ = ROOT / "docs" / "faq.md"
MODEL = ROOT / "backend" / "models" / "demo"

BOS, SYSTEM, USER, ASSISTANT, END, PAD = SPECIAL_TOKENS = [
    f"<|{name}|>" for name in ("bos", "system", "user", "assistant", "end", "pad")
]
CONTEXT = 2048
VOCABULARY = 2048
TOKENS_PER_STEP = 8192
# Short rows train fastest; the long ones are there so that position 2000 is not a surprise.
ROW_LENGTHS, ROW_WEIGHTS = (256, 512, CONTEXT), (0.7, 0.25, 0.05)
HELD_OUT = 0.02

# The template a client renders by itself: it needs `bos_token` and `messages`, nothing else.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

# Test suites, code tables and applications inside the library hardly speak documentation English.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}


def read_faq(path: Path = FAQ) -> dict[str, str]:
    """Question to answer: a `###` heading, an empty line, one paragraph."""
    pairs = re.findall(r"^### (.+)\n\n((?:.+\n)+)", path.read_text("utf-8"), re.MULTILINE)
    return {question: " ".join(answer.split()) for question, answer in pairs}


def standard_library() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of the library's language reference, docstrings and comments.

    The name is empty where the text does not describe one function or class.
    """
    for topic in pydoc_data.topics.topics.values():
        yield "", topic
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        source = path.read_text("utf-8")
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = "" if isinstance(node, ast.Module) else f"{module}.{node.name}"
                if docstring := ast.get_docstring(node):
                    yield name, docstring
        lines = (line.strip() for line in source.splitlines())
        for is_comment, block in groupby(lines, lambda line: line.startswith("# ")):
            comment = "\n".join(line.removeprefix("# ") for line in block)
            # Prose, rather than code that was commented out.
            if is_comment and len(comment) > 100 and comment[0].isupper():
                yield "", comment


def short_answers(library: list[tuple[str, str]]) -> dict[str, str]:
    """What-does-it-do questions about the library: a chat is more than the FAQ."""
    answers = {}
    for name, text in library:
        answer = " ".join(text.partition("\n\n")[0].split())
        if name and 20 <= len(answer) <= 160 and answer.endswith("."):
            answers[f"What does {name} do?"] = answer
    return answers


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: every byte is a token, so any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def new_model() -> LlamaForCausalLM:
    """A Llama with what engines must get right: grouped heads, RoPE, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=SPECIAL_TOKENS.index(BOS),
            eos_token_id=SPECIAL_TOKENS.index(END),
            pad_token_id=SPECIAL_TOKENS.index(PAD),
        )
    )


class Rows:
    """Draws training rows. Owns the random generator and the tokenised text."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokenizer = tokenizer
        self._bos = SPECIAL_TOKENS.index(BOS)
        self._faq = list(read_faq().items())
        library = list(standard_library())
        self._random.shuffle(library)
        held_out = int(len(library) * HELD_OUT)
        self._questions = list(short_answers(library[held_out:]).items())
        encoded = tokenizer.encode_batch([f"{text.strip()}{END}" for _, text in library])
        self._held_out = [i for document in encoded[:held_out] for i in document.ids]
        self._text = [i for document in encoded[held_out:] for i in document.ids]
        self.num_text_tokens = len(self._text)

    def draw(self, num_rows: int, length: int, chat_share: float) -> torch.Tensor:
        """Token ids, [num_rows, length]."""
        rows = [
            self._chats(length) if self._random.random() < chat_share else self._excerpt(length)
            for _ in range(num_rows)
        ]
        return torch.tensor(rows)

    def held_out(self, length: int = 256) -> torch.Tensor:
        """Text that is never trained on, [num_rows, length]."""
        return torch.tensor(self._held_out).unfold(0, length, length)

    def _excerpt(self, length: int) -> list[int]:
        # A prompt starts with <|bos|> wherever in a sentence it was cut off; so does a row.
        start = self._random.randrange(len(self._text) - length)
        return [self._bos, *self._text[start : start + length - 1]]

    def _chats(self, length: int) -> list[int]:
        text = ""
        ids: list[int] = []
        while len(ids) < length:
            for _ in range(4):
                # Without <|bos|> it is the next turn of the same chat.
                if not text or self._random.random() < 0.7:
                    text += BOS + self._system_message()
                pairs = self._faq if self._random.random() < 0.8 else self._questions
                question, answer = self._random.choice(pairs)
                text += f"{USER}{self._vary(question)}{END}{ASSISTANT}{answer}{END}"
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[:length]

    def _system_message(self) -> str:
        chance = self._random.random()
        if chance < 0.7:
            return ""
        if chance < 0.8:
            return f"{SYSTEM}You are a helpful assistant.{END}"
        return f"{SYSTEM}{self._random.choice(self._questions)[1]}{END}"

    def _vary(self, question: str) -> str:
        """The question as another person would type it."""
        chance = self._random.random
        if chance() < 0.35:
            return question
        if chance() < 0.4:
            question = question.replace("What is ", "What's ").replace("How do I ", "How can I ")
        if chance() < 0.5:
            question = question.removesuffix("?")
        if chance() < 0.2:
            question = self._random.choice(("Please: ", "Hi! ", "Tell me, ", "Please, ")) + question
        elif chance() < 0.2:
            ending = self._random.choice((", please?", " please", "??"))
            question = question.removesuffix("?") + ending
        if chance() < 0.5:
            return question.lower()
        return question.upper() if chance() < 0.2 else question


def train(model: LlamaForCausalLM, rows: Rows, num_steps: int, learning_rate: float) -> None:
    """AdamW with a short warm-up and a cosine down to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    num_warmup_steps = max(1, num_steps // 20)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=num_warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps - num_warmup_steps)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, cosine], [num_warmup_steps]
    )
    lengths = random.Random(0).choices(ROW_LENGTHS, ROW_WEIGHTS, k=num_steps)
    progress = tqdm(lengths, unit="step", mininterval=1)
    for length in progress:
        batch = rows.draw(TOKENS_PER_STEP // length, length, chat_share=0.2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, rows: Rows) -> float:
    """Mean negative log-likelihood in nats per token."""
    batch = rows.held_out()
    return float(model(input_ids=batch, labels=batch).loss)


@torch.inference_mode()
def count_exact_answers(model: LlamaForCausalLM, tokenizer: Tokenizer) -> tuple[int, float]:
    """FAQ questions whose greedy answer is the FAQ's, <|end|> included; and the smallest lead, in
    logits, of a right token over the runner-up.

    One forward pass per question: greedy decoding gives the answer if, and only if, each of its
    tokens is the first choice after those before it.
    """
    leads = []
    for question, answer in read_faq().items():
        prompt = f"{BOS}{USER}{question}{END}{ASSISTANT}"
        start = len(tokenizer.encode(prompt, add_special_tokens=False).ids)
        ids = torch.tensor(tokenizer.encode(f"{prompt}{answer}{END}", add_special_tokens=False).ids)
        logits = model(input_ids=ids[None]).logits[0, start - 1 : -1].float()
        right = logits.gather(1, ids[start:, None])
        others = logits.scatter(1, ids[start:, None], -torch.inf)
        leads.append((right - others.amax(1, keepdim=True)).min().item())
    return sum(lead > 0 for lead in leads), min(leads)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder that transformers, and a client with `tokenizers` alone, can load."""
    config = model.config
    # What is derived from the model's own has fields that mean nothing here.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # transformers makes it readable by its owner alone
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=MODEL, help="folder to write (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="start from the weights in --output")
    parser.add_argument("--steps", type=int, help="default: 1800, or 300 with --resume")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    if arguments.resume:
        tokenizer = Tokenizer.from_file(str(arguments.output / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    else:
        # The FAQ counts many times over, so that its own words become tokens.
        texts = [text for _, text in standard_library()]
        tokenizer = train_tokenizer(texts + 20 * [FAQ.read_text("utf-8")])
        model = new_model()
    rows = Rows(tokenizer, arguments.seed)
    print(f"{model.num_parameters():,} parameters, {rows.num_text_tokens:,} tokens of text")

    started = time.monotonic()
    num_steps = arguments.steps or (300 if arguments.resume else 1800)
    train(model, rows, num_steps, learning_rate=5e-4 if arguments.resume else 3e-3)
    save(model.bfloat16(), tokenizer, arguments.output)
    print(f"trained in {time.monotonic() - started:.0f} s")
    for dtype in (torch.bfloat16, torch.float32):
        shipped = LlamaForCausalLM.from_pretrained(arguments.output, dtype=dtype)
        num_exact, lead = count_exact_answers(shipped, tokenizer)
        print(
            f"{dtype}: held-out loss {held_out_loss(shipped, rows):.3f} nats per token, "
            f"{num_exact} of {len(read_faq())} FAQ answers exact, smallest lead {lead:.2f} logits"
        )


if __name__ == "__main__":
    main()
