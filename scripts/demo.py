"""Stream the demo model's answers to eight prompts at once, through the whole engine."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

import kill_demo
from footplate.frontend import (
    AsyncLLMEngine,
    EngineArgs,
    RequestOutput,
    SamplingParams,
)
from footplate.frontend.prompts import Prompt

# Some of those in docs/faq.md, which the demo model knows by heart.
QUESTIONS = (
    "What is Footplate?",
    "Why are there two processes?",
    "How do I cancel a request?",
    "What happens when the client dies?",
    "Does an idle engine use the CPU?",
    "What is chunked prefill?",
)
BEGINNINGS = ("The function returns a", "If the argument is omitted, the")

console = Console(highlight=False)


@dataclass
class Answer:
    """One prompt and what has come of it."""

    prompt: Prompt
    shown: str
    params: SamplingParams
    output: RequestOutput | None = None

    def render(self) -> Text:
        """One paragraph: prompt bold, answer plain."""
        text = Text(self.shown + " ", style="bold")
        if self.output is not None:
            text.append(" ".join(self.output.outputs[0].text.split()), style="not bold")
        return text


def make_answers() -> list[Answer]:
    """Six questions for the chat template and two beginnings to be continued."""
    chat = SamplingParams(temperature=0, max_tokens=80)
    plain = SamplingParams(temperature=0.4, seed=7, max_tokens=40)
    return [Answer([{"role": "user", "content": q}], q, chat) for q in QUESTIONS] + [
        Answer(beginning, beginning, plain) for beginning in BEGINNINGS
    ]


async def stream(engine: AsyncLLMEngine, answer: Answer, redraw: Callable[[], None]) -> None:
    """Follow one answer to its end."""
    async for output in engine.generate(answer.prompt, answer.params):
        answer.output = output
        redraw()


async def run(model: str, set_up_seconds: float) -> None:
    """Start an engine, stream all answers, print the figures."""
    since = time.perf_counter()
    async with AsyncLLMEngine.from_engine_args(EngineArgs(model=model)) as engine:
        started = time.perf_counter()
        answers = make_answers()
        with Live(console=console, refresh_per_second=20, transient=False) as live:

            def redraw() -> None:
                # A pipe gets the final state only; a terminal watches it grow.
                live.update(Group(*(answer.render() for answer in answers)))

            await asyncio.gather(*(stream(engine, answer, redraw) for answer in answers))
        finished = time.perf_counter()
        outputs = [answer.output for answer in answers if answer.output is not None]
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        first = sorted(output.metrics.time_to_first_token_s or 0.0 for output in outputs)
        facts = await engine.get_model_config()
        console.print()
        console.print(
            f"{len(outputs)} streams, {num_tokens} tokens in {finished - started:.2f} s: "
            f"[bold]{num_tokens / (finished - started):.0f} tokens/s[/bold], "
            f"time to first token {1e3 * first[len(first) // 2]:.0f} ms (median)"
        )
        console.print(
            f"client process {os.getpid()}, engine core process {engine.process_id} "
            f"({facts.architecture}, {facts.num_parameters / 1e6:.1f} M parameters, "
            f"{facts.dtype}, {facts.device})"
        )
        set_up = f"set-up took {set_up_seconds:.0f} s" if set_up_seconds else "set-up: skipped"
        console.print(f"{set_up}, start took {started - since:.2f} s")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--kill",
        action="store_true",
        help="kill the engine core in the middle of 64 streams, and count what is lost",
    )
    parser.add_argument("--set-up-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kill:
        sys.exit(0 if asyncio.run(kill_demo.run(args.model)) else 1)
    asyncio.run(run(args.model, args.set_up_seconds))


if __name__ == "__main__":
    main()
