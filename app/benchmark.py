"""Measure the server under load: `python -m app.benchmark --clients 1 8 32`.

Starts the server in a process of its own. For each number of clients, that many send photos at the same time; captions
per second, response times and the server's memory are printed.

`--soak 2000` instead sends 2,000 requests, a quarter of them bad and a tenth interrupted, and checks every answer.
`--start` instead prints the seconds from the start of the server to the answer with its first caption.
"""

import argparse
import dataclasses
import http.client
import json
import random
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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from captioner import Captioner
from captioner.cli import positive
from captioner.pretrained import DEFAULT_MODEL
from captioner.web import FILES

SAMPLES = FILES / "samples"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 done, 1 a wrong answer."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.benchmark", description="Load a server, and measure."
    )
    parser.add_argument("--clients", type=positive, nargs="+", default=[1, 8, 32], help="clients at the same time")
    parser.add_argument("--requests", type=positive, default=64, help="photos sent for each number of clients")
    parser.add_argument("--endurance", type=int, default=0, metavar="N", help="then send N more and print the memory")
    parser.add_argument(
        "--soak", type=positive, metavar="N", help="instead send N good and bad requests, and check them"
    )
    parser.add_argument("--start", action="store_true", help="instead print the seconds to the first caption")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model to serve")
    options = parser.parse_args(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", __package__, "--port", str(port), "--model", options.model]
    started = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    folder = Path(tempfile.mkdtemp())
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)
        if options.start:
            request_caption(url, sorted(SAMPLES.glob("*.jpg"))[0])
            print(f"{time.perf_counter() - started:.2f}")
            return 0
        photos = draw_photos(folder, 32)
        if options.soak:
            captioner = Captioner.from_pretrained(options.model)
            return 0 if soak_table(url, captioner, folder, options.clients[-1], options.soak, server.pid) else 1
        load(url, photos, 2, 8)  # not counted: the first requests are slower
        print(
            "| clients | captions per second | median wait, s | longest wait, s | memory, MB |\n|--:|--:|--:|--:|--:|"
        )
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
    """Return when the server answers. Raises RuntimeError if its process ended."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return
        except urllib.error.URLError:
            time.sleep(0.02)
    raise RuntimeError("the server ended before it answered")


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Different photos, cropped from the samples."""
    paths = []
    for number in range(count):
        samples = sorted(SAMPLES.glob("*.jpg"))
        photo = Image.open(samples[number % len(samples)])
        paths.append(folder / f"{number}.jpg")
        photo.crop((number, number, photo.width - number, photo.height - 2 * number)).save(paths[-1])
    return paths


def load(url: str, photos: Sequence[Path], clients: int, requests: int) -> tuple[float, list[float]]:
    """Captions per second, and the seconds that each request took, its upload included.

    Clients send plain HTTP requests: Gradio's own client takes more processor time than the server.
    """

    def wait(number: int) -> float:
        started = time.perf_counter()
        request_caption(url, photos[number % len(photos)])
        return time.perf_counter() - started

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as people:
        waits = list(people.map(wait, range(requests)))
    return requests / (time.perf_counter() - started), waits


def request_caption(url: str, photo: Path) -> None:
    """Upload a photo and wait for its caption. Raises RuntimeError if the answer has none."""
    answer = call(url, upload(url, photo))
    if "caption" not in answer:
        raise RuntimeError(f"no caption: {answer}")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of request and the answer that is expected.

    photo: a file to upload first, or the value that is sent in place of one.
    settings: the values that differ from the defaults, by position.
    expected: part of the error, or the caption and its log-probability.
    """

    name: str
    photo: Any
    expected: str | tuple[str, float]
    settings: tuple[tuple[int, Any], ...] = ()


def good_cases(captioner: Captioner, photos: Sequence[Path]) -> list[Case]:
    """Photos, each with the caption of the library."""
    captions = [captioner.caption(photo, beam_size=3) for photo in photos]
    return [
        Case("good", photo, (str(caption), caption.log_probability), ((2, 3),))
        for photo, caption in zip(photos, captions, strict=True)
    ]


def bad_cases(folder: Path, photo: Path) -> list[Case]:
    """Requests whose answer is an error. Their files are written to `folder`."""
    files = {name: folder / name for name in ("damaged.jpg", "huge.png", "text.jpg", "empty.jpg", "heavy.jpg")}
    files["damaged.jpg"].write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    Image.new("1", (20000, 10000)).save(files["huge.png"])
    files["text.jpg"].write_text("no picture")
    files["empty.jpg"].touch()
    files["heavy.jpg"].write_bytes(photo.read_bytes() + bytes(25 * 1024 * 1024))
    absent = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}
    link = {"path": "http://example.com/a.jpg", "meta": {"_type": "gradio.FileData"}}
    return [
        Case("damaged", files["damaged.jpg"], "damaged"),
        Case("huge", files["huge.png"], "too large"),
        Case("text", files["text.jpg"], "not a picture"),
        Case("empty", files["empty.jpg"], "empty"),
        Case("too heavy", files["heavy.jpg"], "maximum allowed size"),
        Case("not uploaded", absent, "was not uploaded"),
        Case("a link", link, "asks no other host"),
        Case("no file", None, "Choose a photo"),
        Case("no such file", 5, "path that its upload gave"),
        Case("beam size 0", photo, "beam size should be", ((2, 0),)),
        Case("beam size nan", photo, "beam size should be", ((2, float("nan")),)),
        Case("temperature as text", photo, "temperature should be", ((6, "hot"),)),
        Case("seed null", photo, "seed should be", ((8, None),)),
        Case("no such model", photo, "There is no model", ((1, "x"),)),
        Case("too few values", photo, "of 9 values", ((8, ...),)),
    ]


def soak(
    url: str, good: Sequence[Case], bad: Sequence[Case], clients: int, requests: int, seed: int = 0
) -> Counter[str]:
    """Send requests, of which a quarter are bad and a tenth are interrupted. Returns the number of each kind.

    Raises:
        AssertionError: an answer is not the expected one.
    """
    chance = random.Random(seed)
    order = [chance.choice(bad) if number % 4 == 3 else chance.choice(good) for number in range(requests)]

    def send(number: int) -> str:
        case = order[number]
        if number % 10 == 5:
            break_off(url, case)
            return "broken off"
        answer = ask(url, case)
        if isinstance(case.expected, str):
            assert case.expected in answer.get("error", ""), f"{case.name}: {answer}"
        else:
            assert "caption" in answer, f"{case.name}: {answer}"
            text, log_probability = case.expected
            # Sums in another batch differ in the last digits, so captions that are equally likely may change places.
            same = answer["caption"] == text or abs(answer["log_probability"] - log_probability) < 1e-4
            assert same, f"{answer['caption']} is not {text}"
        return case.name

    with ThreadPoolExecutor(clients) as people:
        return Counter(people.map(send, range(requests)))


def ask(url: str, case: Case) -> dict[str, Any]:
    """The answer to a request over plain HTTP: a caption as JSON, or an error."""
    try:
        photo = upload(url, case.photo) if isinstance(case.photo, Path) else case.photo
        return call(url, photo, *case.settings)
    except urllib.error.HTTPError as error:
        with error:
            return {"error": error.read().decode()}


def upload(url: str, path: Path) -> dict[str, Any]:
    """Upload a file. Returns the value by which requests name it."""
    request = urllib.request.Request(f"{url}/gradio_api/upload", *form(path))
    with urllib.request.urlopen(request, timeout=120) as answer:
        return {"path": json.load(answer)[0], "meta": {"_type": "gradio.FileData"}}


def form(path: Path) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a POST request that uploads a file."""
    head = f'--captioner\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = head.encode() + path.read_bytes() + b"\r\n--captioner--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=captioner"}


def call(url: str, photo: Any, *settings: tuple[int, Any]) -> dict[str, Any]:
    """The answer of /caption for an uploaded photo. A value of `...` is left out."""
    with urllib.request.urlopen(f"{url}/gradio_api/call/caption/{start(url, photo, *settings)}", timeout=120) as answer:
        event, data = answer.read().decode().strip().splitlines()[-2:]
    values = json.loads(data.removeprefix("data: "))
    return values[0] if event == "event: complete" else {"error": str(values)}


def start(url: str, photo: Any, *settings: tuple[int, Any]) -> str:
    """Put a request into the queue. Returns the id of its answer."""
    values = [photo, "", 5, 1, 22, False, 1.0, 0.9, 0]
    for place, value in settings:
        values[place] = value
    data = json.dumps({"data": [value for value in values if value is not ...]}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/call/caption", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["event_id"]


def break_off(url: str, case: Case) -> None:
    """Disconnect in the middle of the upload, or while waiting for the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        if isinstance(case.expected, str) and isinstance(case.photo, Path):
            send_half(connection, case.photo)
        elif isinstance(case.photo, Path):
            connection.request("GET", f"/gradio_api/call/caption/{start(url, upload(url, case.photo))}")
            connection.sock.settimeout(0.05)
            connection.sock.recv(1)
    except OSError:
        pass
    finally:
        connection.close()


def send_half(connection: http.client.HTTPConnection, photo: Path) -> None:
    """Begin an upload and send half of it."""
    body, headers = form(photo)
    connection.putrequest("POST", "/gradio_api/upload")
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body[: len(body) // 2])


class HealthWatch(threading.Thread):
    """Requests /health five times a second inside a `with` block.

    asked: number of requests.
    longest: seconds of the slowest answer.
    """

    def __init__(self, url: str) -> None:
        super().__init__(name="health")
        self.url, self.ended = url, threading.Event()
        self.asked, self.longest = 0, 0.0

    def run(self) -> None:
        """Send requests until the block ends."""
        while not self.ended.wait(0.2):
            started = time.perf_counter()
            urllib.request.urlopen(f"{self.url}/health", timeout=60).close()
            self.asked += 1
            self.longest = max(self.longest, time.perf_counter() - started)

    def __enter__(self) -> "HealthWatch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def soak_table(url: str, captioner: Captioner, folder: Path, clients: int, requests: int, process: int) -> bool:
    """Send the requests in ten parts and print memory and threads after each. Returns whether all were right."""
    photos = draw_photos(folder, 32)
    good, bad = good_cases(captioner, photos), bad_cases(folder, photos[0])
    done: Counter[str] = Counter()
    print("| requests | memory, MB | threads | slowest /health, s |\n|--:|--:|--:|--:|")
    try:
        for part in range(10):
            with HealthWatch(url) as health:
                done += soak(url, good, bad, clients, max(1, requests // 10), seed=part)
            cells = (sum(done.values()), memory(process), threads(process), f"{health.longest:.2f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    except AssertionError as error:
        print(f"wrong: {error}")
        return False
    time.sleep(15)  # idle threads end after ten seconds
    print(f"after a pause: {memory(process)} MB, {threads(process)} threads")
    print(", ".join(f"{name}: {count}" for name, count in sorted(done.items())))
    return True


def threads(process: int) -> int:
    """Number of threads of a process, from Linux's /proc."""
    return len(list(Path(f"/proc/{process}/task").iterdir()))


def memory(process: int) -> int:
    """Resident memory of a process in megabytes, from Linux's /proc."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024)
    raise RuntimeError("/proc has no memory of the process")


if __name__ == "__main__":
    sys.exit(main())
