"""Memory of a run, after each epoch: it must not grow with the epochs.

    python -m benchmarks.memory --data-dir COMPETITION --model cnn --num-epochs 8 [any flag of script.py]

Runs `script.py` with these flags in a temporary output folder and prints the process's resident memory after each
epoch's validation, then its peak (Linux).
"""

import os
import sys
import tempfile

import script


def resident_gb() -> float:
    """Memory that this process holds now, in GB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def main() -> None:
    validate, readings = script.validate, []

    def validate_and_read(*arguments):
        figures = validate(*arguments)
        readings.append(resident_gb())
        return figures

    script.validate = validate_and_read
    with tempfile.TemporaryDirectory() as folder:
        status = script.main([*sys.argv[1:], "--output-dir", folder])
    print("resident memory after each epoch, GB:", " ".join(f"{reading:.2f}" for reading in readings))
    print(f"peak {script.peak_memory_gb()} GB")
    sys.exit(status)


if __name__ == "__main__":
    main()
