"""Make the virtual environment that every `make` target runs in: `python3 tools/environment.py .venv --torch SPEC`.

Runs under the interpreter that is to be used, with nothing but its standard library, and on versions too old for the
project itself, so that these get a sentence instead of a syntax error. A torch that the interpreter has is reused:
its builds differ by machine, and the wrong one is gigabytes.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig

OLDEST = (3, 10)
# Exits with 0 where torch imports and is no older than pyproject.toml asks for.
TORCH_QUERY = "import sys, torch; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 4))"


def fail(sentence):
    """Leave with one sentence on stderr."""
    sys.exit("zigma: " + sentence)


def check_interpreter():
    """Name what this interpreter lacks before anything is written."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        fail(
            f"{sys.executable} is Python {found}, but {OLDEST[0]}.{OLDEST[1]} or newer is needed: "
            "name one with `make PYTHON=/path/to/python3 ...`."
        )
    try:
        import ensurepip  # noqa: F401  (Debian ships venv without it)
        import venv  # noqa: F401
    except ImportError as error:
        fail(
            f"{sys.executable} (Python {found}) has no module {error.name!r}, which makes virtual environments: "
            f"`sudo apt install python3-venv` on Debian or Ubuntu, or name another with `make PYTHON=...`."
        )


def run(command, remedy):
    """Run a command and let its output through; say what failed and what helps if it does."""
    status = subprocess.call(command)
    if status:
        fail(f"`{' '.join(command)}` failed with exit status {status}: {remedy}")


def succeeds(python, statement):
    """Whether that interpreter exists and runs the statement."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return os.path.exists(python) and subprocess.call([python, "-c", statement], **quiet) == 0


def create(folder, python):
    """Create the environment, over the interpreter's own packages when torch is among them."""
    reuse = succeeds(sys.executable, TORCH_QUERY)
    command = [sys.executable, "-m", "venv", "--clear", folder]
    run(command + ["--system-site-packages"] * reuse, f"remove {folder} and look at the message above.")
    if reuse and not succeeds(python, TORCH_QUERY):
        # The interpreter is itself a virtual environment; --system-site-packages only reaches the one below it.
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        inside = subprocess.check_output([python, "-c", query], text=True).strip()
        with open(os.path.join(inside, "interpreter.pth"), "w") as file:
            file.write("\n".join(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})) + "\n")


def main():
    """Create the environment if it is missing, then install torch if it is missing, then this project."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--torch", default="torch", help="what pip installs where the interpreter has no torch")
    parser.add_argument("--extras", default="test", help="extras of pyproject.toml, separated by commas")
    options = parser.parse_args()

    check_interpreter()
    python = os.path.join(options.folder, "bin", "python")
    if not succeeds(python, "import pip"):  # missing, or left half made by an interrupted run
        create(options.folder, python)
    network = "check the network, or name another build with `make TORCH=...` (README, Set-up)."
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not succeeds(python, TORCH_QUERY):
        print(f"zigma: installing {options.torch} into {options.folder}; this is the large part", flush=True)
        run([item for item in pip if item != "--quiet"] + shlex.split(options.torch), network)
    print(f"zigma: installing the project and its other dependencies into {options.folder}", flush=True)
    run([*pip, "--editable", f".[{options.extras}]"], network)


if __name__ == "__main__":
    main()
