"""The main job at small scale: collect, train three agents, evaluate them in dm_control. `make demo` runs this.

Every step is an ordinary command of this repository, printed before it runs. Running it again goes on where it
was interrupted.
"""

import json
import sys
import time
from pathlib import Path

from ring_rl.child_process import run_to_its_end

REPOSITORY = Path(__file__).parents[1]
RUNS = Path("experiments/runs/demo")
EVALUATION = RUNS / "evaluation"
AGENTS = {
    "agentic_transformer": [],
    "decision_transformer": ["batch.batch_size=16", "loop.steps=500"],
    "behaviour_cloning": ["batch.batch_size=8"],
}


def run(*command: str) -> None:
    """Runs a command of this repository, shown to the user; stops the demo if it fails."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    exit_code = run_to_its_end([sys.executable, *command], folder=REPOSITORY)
    if exit_code:
        sys.exit(exit_code)


def main() -> None:
    """Runs the four steps and names what they made."""
    start = time.perf_counter()
    run("datasets/exorl/collect.py", "task=cartpole_swingup")
    for agent, options in AGENTS.items():
        run("experiments/train_agent.py", "experiment=demo", f"agent={agent}", *options)
    run_dirs = [RUNS / agent / "seed_0" for agent in AGENTS]
    run(
        "experiments/evaluate_agent.py",
        f"runs=[{','.join(map(str, run_dirs))}]",
        f"output={EVALUATION}",
        "overwrite=true",
    )
    for run_dir in run_dirs:
        print(f"picture {run_dir / 'plots' / 'learning_curve.png'}")
    compiled = json.loads((REPOSITORY / run_dirs[0] / "compiled.json").read_text())
    print(
        f"demo_seconds={time.perf_counter() - start:.0f} ring_size={compiled['mesh']['sp']} "
        f"collective_permutes={compiled['collective_permutes']}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
