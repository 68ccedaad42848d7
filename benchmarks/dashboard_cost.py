"""What the live dashboard costs a generation: tokens a second with it and without, by turns, in a real kernel.

    python benchmarks/dashboard_cost.py [MODEL] [--tokens 150] [--rounds 4]

One JSON line. MODEL is a folder or a Hub id; without it, SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import statistics

from jupyter_client.manager import start_new_kernel

SETUP = """
%load_ext airllm_nb
import airllm_nb
MODEL = {model!r} or airllm_nb.sample_model()
"""
LOAD = '%airllm_load "{{MODEL}}" --name {mode} --dashboard {mode}'
RUN = "%%airllm_generate --name {mode} -n {tokens} -o answer\nOnce upon a time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    manager, client = start_new_kernel()
    try:
        say = _speaker(client)
        say(SETUP.format(model=given.model))
        modes = ("none", "full")
        for mode in modes:
            say(LOAD.format(mode=mode))
        speeds: dict[str, list[float]] = {mode: [] for mode in modes}
        for turn in range(given.rounds + 1):
            for mode in modes if turn % 2 else modes[::-1]:
                say(RUN.format(mode=mode, tokens=given.tokens))
                # The first round warms up.
                if turn:
                    speeds[mode].append(float(say("print(1 / answer.sweep_seconds, end='')")))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    best = {mode: max(found) for mode, found in speeds.items()}
    middle = {mode: statistics.median(found) for mode, found in speeds.items()}
    print(json.dumps({"best": best, "median": middle, "cost_of_median": 1 - middle["full"] / middle["none"]}))


def _speaker(client):  # type: ignore[no-untyped-def]
    def say(code: str) -> str:
        """Run a cell; returns what it printed."""
        written: list[str] = []

        def hear(message: dict) -> None:  # type: ignore[type-arg]
            if message["msg_type"] == "stream":
                written.append(message["content"]["text"])

        reply = client.execute_interactive(code, output_hook=hear, timeout=600)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(reply["content"])
        return "".join(written)

    return say


if __name__ == "__main__":
    main()
