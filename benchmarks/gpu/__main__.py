"""All measurements on a GPU, with one command:

    python -m benchmarks.gpu

It takes at most 8 minutes on an H100 and downloads nothing. The models have the published shape and
random weights, made on the device. Each result is in the JSON file as soon as it is there; the same
command again runs what is missing, and what ended in an error. `--device cpu --tiny` tries all steps
on small shapes.

The numbers of the original code (golden sets) are looked for in the folder that OWL2_HF_GOLDEN
names, then in `shared/golden` inside the repository or beside it, then in `tests/golden`.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from pathlib import Path

from .outcomes import ERROR, read, table
from .watch import LOST, watch

HERE = Path(__file__).parent
# What tells most comes first.
ORDER = ("parity", "decoder", "scoring", "generation", "training")
PARTS = tuple(name for name in ORDER if (HERE / f"{name}.py").is_file())
JSON = HERE.parent / "results" / "gpu.json"
TRY = HERE.parents[1] / "build" / "gpu-tiny.json"


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8, help="time for all steps (default: 8)")
    parser.add_argument(
        "--json",
        type=Path,
        help=f"file of the results (default: {JSON.relative_to(HERE.parents[1])}, with --tiny "
        f"{TRY.relative_to(HERE.parents[1])})",
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a try on a CPU")
    # What the process that measures is told.
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--retry", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    args.parts = args.parts or list(PARTS)
    args.json = args.json or (TRY if args.tiny else JSON)
    return parser, args


def main() -> int:
    parser, args = parse()
    if args.work:
        return work(args)
    if args.device == "cpu" and not args.tiny:
        parser.error("the published shape is too large for a CPU: add --tiny")
    try:
        read(args.json)
    except ValueError as error:
        parser.error(str(error))
    command = [sys.executable, "-m", "benchmarks.gpu", "--work", *args.parts]
    command += ["--json", str(args.json), "--device", args.device, *["--tiny"][: args.tiny]]
    # This checkout is measured, not another version that may be installed.
    paths = [str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # The process that measures ends with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    status = watch(command, args.json, args.minutes)
    if (content := read(args.json)) is None:
        return status
    results = {part: content["results"].get(part, {}) for part in args.parts}
    print(f"\n{content['machine']['device']}, results in {args.json}\n{table(results)}")
    failed = any(ERROR in one for steps in results.values() for one in steps.values())
    return status or int(failed)


def work(args: argparse.Namespace) -> int:
    """Run the steps in this process."""
    import torch
    from transformers.utils import logging

    from . import frame

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = torch.zeros(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        print(
            f"benchmarks.gpu: device {args.device!r} cannot be used ({reason}); on a machine "
            "without a GPU, try the steps with --device cpu --tiny",
            file=sys.stderr,
        )
        return 2
    parts = {part: steps_of(part) for part in args.parts}
    try:
        setting = frame.Setting(device, args.tiny)
        minutes = (args.until - time.time()) / 60
        frame.run(parts, setting, minutes, args.json, args.retry)
    except frame.DeviceLost as lost:
        print(f"the device failed after {lost}: a new process continues", flush=True)
        return LOST
    return 0


def steps_of(part: str) -> list:
    """The steps of a part; one that fails and says why if its module cannot be imported."""
    from . import frame

    try:
        return importlib.import_module(f"{__package__}.{part}").STEPS
    except Exception as error:
        failure = error

    def fail(setting: frame.Setting) -> dict:
        raise failure

    return [frame.Step("import", fail, minutes=0)]


if __name__ == "__main__":
    sys.exit(main())
