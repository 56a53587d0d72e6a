"""The gate from the command line: `python -m codegen` checks, `--update` writes the golden table, `--show` prints reports."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

from . import gate


def main() -> int:
    """Compiles everything for every architecture; 1 if anything is objected to."""
    parser = argparse.ArgumentParser(prog="python -m codegen", description="compile every shipped kernel and read the assembly")
    parser.add_argument("--arch", action="append", choices=gate.ARCHITECTURES, help="only this one; may be repeated")
    parser.add_argument("--update", action="store_true", help="write the golden table of the installed Triton")
    parser.add_argument("--show", action="store_true", help="print every report")
    arguments = parser.parse_args()
    if arguments.update and arguments.arch:
        parser.error("a golden table holds every architecture: give --update or --arch, not both")
    results = {arch: gate.compile_all(arch) for arch in arguments.arch or gate.ARCHITECTURES}
    golden = json.loads(gate.golden_file().read_text()) if gate.golden_file().exists() else {}
    faults = 0
    for arch, outcomes in results.items():
        found = gate.remembered(outcomes)
        for outcome in outcomes:
            wrong = gate.objections(arch, outcome)
            expected = golden.get(arch, {}).get(outcome.name)
            if not arguments.update and not wrong and expected != found[outcome.name]:
                wrong = [f"{found[outcome.name]}, but the golden table says {expected}"]
            faults += bool(wrong)
            if arguments.show:
                print(arch, outcome.name, outcome.report or "", flush=True)
            for reason in wrong:
                print(f"{arch} {outcome.name}: {reason}")
    if arguments.update:
        gate.write_golden(results)
    print(f"Triton {version('triton')}: {sum(map(len, results.values()))} cases, {faults} objected to")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
