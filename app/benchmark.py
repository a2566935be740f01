"""How the server does under load: `python -m app.benchmark --clients 1 8 32`.

Starts the server on a free port in a process of its own, lets so many clients send photographs one after another,
and prints captions a second, waiting times, and the server's memory before and after.
"""

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from captioner.cli import positive

SAMPLES = Path(__file__).parent / "assets" / "samples"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m app.benchmark", description="Measure the server under load.")
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 32], help="clients at the same time")
    parser.add_argument("--requests", type=positive, default=64, help="photographs sent for each number of clients")
    parser.add_argument("--endurance", type=int, default=0, help="then send so many more and look at the memory")
    options = parser.parse_args(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "app", "--port", str(port)], stderr=subprocess.DEVNULL)
    folder = Path(tempfile.mkdtemp())
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        photos = draw_photos(folder, 32)
        load(url, photos, 2, 8)  # not counted: the first ones warm up
        print("| clients | captions a second | median wait, s | longest wait, s | memory, MB |\n|--:|--:|--:|--:|--:|")
        for clients in options.clients:
            rate, waits = load(url, photos, clients, max(options.requests, 2 * clients))
            cells = (clients, f"{rate:.1f}", f"{statistics.median(waits):.2f}", f"{max(waits):.2f}", memory(server.pid))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        for done in range(0, options.endurance, 200):
            load(url, photos, 16, min(200, options.endurance - done))
            print(f"after {done + 200} more requests: {memory(server.pid)} MB", flush=True)
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(folder)
    return 0


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the server answers. Raises RuntimeError where it has ended."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise RuntimeError("the server ended before it answered")


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Photographs that all differ, cut from the samples."""
    paths = []
    for number in range(count):
        samples = sorted(SAMPLES.glob("*.jpg"))
        photo = Image.open(samples[number % len(samples)])
        paths.append(folder / f"{number}.jpg")
        photo.crop((number, number, photo.width - number, photo.height - 2 * number)).save(paths[-1])
    return paths


def load(url: str, photos: Sequence[Path], clients: int, requests: int) -> tuple[float, list[float]]:
    """Captions a second, and the seconds that each request took, its upload included."""
    from gradio_client import Client, handle_file

    own = threading.local()

    def connect() -> None:
        own.client = Client(url, verbose=False)

    def ask(number: int) -> float:
        started = time.perf_counter()
        answer = own.client.predict(image=handle_file(str(photos[number % len(photos)])), api_name="/caption")
        if "caption" not in answer:
            raise RuntimeError(f"no caption: {answer}")
        return time.perf_counter() - started

    with ThreadPoolExecutor(clients, initializer=connect) as people:
        barrier = threading.Barrier(clients)
        list(people.map(lambda _: barrier.wait(), range(clients)))  # everybody is connected before the clock starts
        started = time.perf_counter()
        waits = list(people.map(ask, range(requests)))
        return requests / (time.perf_counter() - started), waits


def memory(process: int) -> int:
    """Resident memory of a process in megabytes, as Linux tells it."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024)
    raise RuntimeError("this system does not tell a process's memory")


if __name__ == "__main__":
    sys.exit(main())
