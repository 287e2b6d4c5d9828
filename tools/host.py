"""A real ComfyUI: found, started without touching its folders, asked to run a workflow.

Only the standard library: this runs under the interpreter of the tests as well as under a bare one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

PACK = Path(__file__).resolve().parents[1]
READY_SECONDS = 180


def find_hosts() -> list[Path]:
    """Folders of ComfyUI: COMFYUI_PATH (one or several), else the one this pack is installed in, else usual places.

    Raises:
        FileNotFoundError: COMFYUI_PATH names a folder that is no ComfyUI.
    """
    parts = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)
    stated = [Path(part).expanduser() for part in parts if part.strip()]
    for path in stated:
        if not _is_host(path):
            raise FileNotFoundError(f"COMFYUI_PATH names {path}, but no ComfyUI is there: expected one with main.py")
    if stated:
        return stated
    home, above = Path.home(), PACK.parent.parent
    candidates = [above] if PACK.parent.name == "custom_nodes" else []
    candidates += [home / "comfy" / "ComfyUI", *sorted(home.glob("ComfyUI*"))]
    found = {path.resolve(): path for path in candidates if _is_host(path)}
    return list(found.values())


def _is_host(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def interpreter(host: Path) -> Path:
    """COMFYUI_PYTHON, or that of the host's own virtual environment, or this one."""
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"]).expanduser()
    for name in (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe"):
        if (host / name).is_file():
            return host / name
    return Path(sys.executable)


def make_base(folder: Path) -> Path:
    """A base directory for a host: this pack in its custom_nodes, and folders for models, input and output."""
    for name in ("custom_nodes", "models/diffusion_models", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / "ZigMa"
    if not link.exists():
        link.symlink_to(PACK, target_is_directory=True)
    return folder


class HostError(RuntimeError):
    """What the host said, in one sentence."""


class Host:
    """A running ComfyUI."""

    def __init__(self, url: str, process: subprocess.Popen, log: Path) -> None:
        self.url, self.process, self.log = url, process, log

    def ask(self, path: str, body: dict | None = None) -> dict:
        """GET, or POST of a JSON body; the answer's JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise HostError(_complaint(json.loads(error.read() or b"{}"))) from error

    def run(self, workflow: dict, seconds: float = 600) -> dict[str, bytes]:
        """Run a workflow in API format; file name -> PNG of every picture, saved ones before previews.

        Raises:
            HostError: the host refused it, or a node failed; with the node's own message.
        """
        number = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise HostError(f"the host stopped (exit status {self.process.returncode}); its log: {self.log}")
            history = self.ask(f"/history/{number}").get(number)
            if history is not None:
                return self.pictures(history)
            time.sleep(0.2)
        raise HostError(f"the workflow took longer than {seconds:g} s; the host's log: {self.log}")

    def pictures(self, history: dict) -> dict[str, bytes]:
        """The pictures of a run that the host remembers; its error if it failed."""
        for kind, facts in history.get("status", {}).get("messages", []):
            if kind == "execution_error":
                raise HostError(f"{facts['node_type']}: {facts['exception_message'].strip()}")
        pictures = {}
        shown = [image for output in history["outputs"].values() for image in output.get("images", [])]
        # A host runs the ends of a graph in any order.
        for image in sorted(shown, key=lambda image: image["type"] != "output"):
            query = urllib.parse.urlencode(image)
            with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
                pictures[image["filename"]] = answer.read()
        return pictures


def _complaint(answer: dict) -> str:
    """The messages in a refusal, joined."""
    parts = []
    for facts in answer.get("node_errors", {}).values():
        parts += [f"{facts['class_type']}: {e['message']} ({e['details']})" for e in facts["errors"]]
    return "; ".join(parts) or str(answer.get("error", answer))


def _search_also(models: Path, base: Path) -> list[str]:
    """The arguments with which a host also finds what lies in a models folder, after its base directory's."""
    kinds = {path.name: path.name for path in models.iterdir() if path.is_dir()}
    config = base / "more_models.yaml"  # JSON is YAML
    config.write_text(json.dumps({"more": {"base_path": str(models.resolve()), **kinds}}))
    return ["--extra-model-paths-config", str(config)]


@contextlib.contextmanager
def running(host: Path, base: Path | None = None, models: Path | None = None) -> Iterator[Host]:
    """Start the host on a free port with a base directory of its own; stop it at the end.

    models: a folder like the host's models/, whose files it finds as well.
    """
    with contextlib.ExitStack() as stack:
        if base is None:
            base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zigma-host-")))
        make_base(base)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = base / "host.log"
        python = interpreter(host)
        question = [python, "-c", "import torch; print(torch.cuda.is_available())"]
        seen = subprocess.run(question, capture_output=True, text=True, check=False)
        command = [python, "main.py", "--port", str(port), "--base-directory", base, "--disable-auto-launch"]
        command += ["--database-url", "sqlite:///:memory:"] + ["--cpu"] * (seen.stdout.strip() != "True")
        command += _search_also(models, base) if models and models.is_dir() else []
        output = stack.enter_context(log.open("w"))
        process = subprocess.Popen([str(c) for c in command], cwd=host, stdout=output, stderr=subprocess.STDOUT)
        stack.callback(_stop, process)
        running_host = Host(f"http://127.0.0.1:{port}", process, log)
        _wait_until_ready(running_host)
        yield running_host


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def _wait_until_ready(host: Host) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if host.process.poll() is not None:
            lines = host.log.read_text(errors="replace").strip().splitlines()[-12:]
            raise HostError("the host did not start; its last lines:\n" + "\n".join(lines))
        try:
            host.ask("/system_stats")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise HostError(f"the host was not ready within {READY_SECONDS} s; its log: {host.log}")
