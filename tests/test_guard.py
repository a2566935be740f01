"""What the demo's server refuses: other hosts, files of the machine, strangers, and requests that fail others."""

import asyncio
import contextlib
import http.client
import io
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit

import gradio_client
import pytest
from conftest import PHOTOS, run_app
from gradio.utils import get_upload_folder

from app import auth
from app.__main__ import main
from app.auth import Passwords, hash_password, matches
from app.benchmark import call, form, start, upload
from app.guard import FULL, LINK, MOST_BYTES, NO_FILE, NOT_UPLOADED
from app.handlers import Handlers
from app.page import build
from app.server import SAMPLES, create
from app.service import Refused, Service, settings_of
from app.uploads import Uploads
from captioner import Captioner

PHOTO = PHOTOS / "cat.jpg"
META = {"meta": {"_type": "gradio.FileData"}}
HOST = "photos.example"


@pytest.fixture(scope="module")
def url(small):
    with run_app({"small": small}) as address:
        yield address


@pytest.fixture
def asked(monkeypatch):
    """The hosts, other than this machine, whose address somebody looks up or that somebody connects to."""
    hosts = []

    def recorded(name, function):
        def look_up(host, *rest, **named):
            if host not in ("127.0.0.1", "localhost", None):
                hosts.append(host)
                raise socket.gaierror(f"{name}({host!r})")
            return function(host, *rest, **named)

        return look_up

    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, recorded(name, getattr(socket, name)))
    real = socket.socket.connect

    def connect(self, address):
        if isinstance(address, tuple) and address[0] != "127.0.0.1":
            hosts.append(address[0])
            raise OSError(f"connect({address!r})")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    return hosts


def send(url, method, path, body=None, timeout=20, **headers):
    """Status and text of an answer, or of its first part where it never ends."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    with contextlib.closing(connection):
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.read1(10**6).decode("utf-8", "replace")


def config(url):
    """The page as Gradio describes it to the browser."""
    with urllib.request.urlopen(f"{url}/config") as answer:
        return json.load(answer)


def functions(url):
    """The page's functions as Gradio lists them."""
    return config(url)["dependencies"]


def join(url, function, data, session):
    """Call one of the page's functions as the page does; the last message."""
    body = {"data": data, "fn_index": function, "session_hash": session}
    status, text = send(url, "POST", "/gradio_api/queue/join", body)
    assert status == 200, text
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60) as answer:
        messages = [json.loads(line[6:]) for line in answer.read().decode().splitlines() if line.startswith("data: ")]
    return next(one for one in messages if one["msg"] == "process_completed")


LINKS = [
    {"path": f"http://{HOST}/a.jpg"} | META,
    {"path": f"https://{HOST}/a.jpg", "url": f"https://{HOST}/a.jpg"} | META,
    {"path": f"HTTP://{HOST}/a.jpg"} | META,
    {"path": f" http://{HOST}/a.jpg"} | META,
    {"path": f"ftp://{HOST}/a.jpg"} | META,
    {"path": f"file://{HOST}/etc/hostname"} | META,
    {"path": f"http://{HOST}/a.jpg"},
    {"path": None, "url": f"http://{HOST}/a.jpg"} | META,
    {"path": "", "url": f"http://{HOST}/a.jpg"} | META,
    {"url": f"http://{HOST}/a.jpg"},
]


@pytest.mark.parametrize("photo", LINKS)
def test_a_photo_on_another_host_is_refused_and_nobody_is_asked(url, asked, photo):
    assert call(url, photo) == {"error": LINK}
    assert asked == []


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False, analytics_enabled=False)


def test_the_client_library_is_told_that_links_are_refused(client):
    assert client.predict(image={"path": f"http://{HOST}/a.jpg"} | META, api_name="/caption") == {"error": LINK}


def test_a_link_in_any_other_place_is_not_followed(url, asked):
    photo, link = upload(url, PHOTO), LINKS[0]
    for place in range(1, 9):
        assert "error" in call(url, photo, (place, link))
        assert "error" in call(url, photo, (place, {"a": [{"b": link}]}))
    assert "caption" in call(url, photo | {"url": link["path"]})  # what a page says of its own uploads is not read
    for number, function in enumerate(functions(url)):
        message = join(url, function["id"], [link] * len(function["inputs"]), f"link{number}")
        assert "words" not in json.dumps(message["output"]), function
    assert asked == []


def test_no_route_asks_another_host(url, asked, small):
    link = f"http://{HOST}/a.jpg"
    headers = {
        "Host": HOST,
        "X-Forwarded-Host": HOST,
        "Referer": link,
        "Authorization": "Bearer hf_abc",
        "x-gradio-history-bucket": "people/history",
        "Cookie": "hf_token=hf_abc",
    }
    body = {"data": [link], "prompt": link, "code": link, "bucket_id": "people/history", "session_hash": "s"}
    for method, path in routes(small):
        for value in (quote(link, safe=""), link, f"{HOST}/a.jpg"):
            path_and_query = (
                with_value(path, value) + f"?bucket={HOST}&deep_link={quote(link)}&session_hash=s&upload_id=u"
            )
            with contextlib.suppress(TimeoutError):  # a stream that has nothing to say yet
                send(url, method, path_and_query, body, timeout=1, **headers)
    for path in (
        "file=https:/",
        "proxy=http://",
        "proxy=https://x.hf.space/?",
        "file=//",
        "/file=http://",
        "FILE=http://",
    ):
        assert send(url, "GET", f"/gradio_api/{path}{HOST}/a.jpg")[0] in (403, 404)
    assert call(url, upload(url, PHOTO))["caption"]
    assert asked == []


def routes(small, **options):
    """Every method and path that the application has, those of Gradio included."""
    server = create({"small": small}, **options)
    found = [*server.routes, *server.state.gradio.routes]
    while found:
        route = found.pop()
        if hasattr(route, "original_router"):  # how FastAPI holds those of an included router
            found += route.original_router.routes
        else:
            for method in sorted(getattr(route, "methods", None) or ["GET"]):
                yield method, route.path


def with_value(path, value):
    """A route's path with a value in place of each parameter."""
    while "{" in path:
        before, _, rest = path.partition("{")
        path = before + value + rest.partition("}")[2]
    return path


FILES = [
    "/etc/hostname",
    "//etc/hostname",
    "/etc/../etc/hostname",
    str(PHOTO),
    "app/__main__.py",
    "../../../../../../../../etc/hostname",
    "{uploads}/../../../../../../etc/hostname",
    "{uploads}/link",
    "{uploads}/folder/hostname",
    "{uploads}",
    "~/.bashrc",
    "\x00",
    "a" * 5000,
    "%2fetc%2fhostname",
    "/proc/self/environ",
    f"{SAMPLES}/../viewer.css",
    f"{SAMPLES}/../../../../../../../../etc/hostname",
    str(SAMPLES),
]


@pytest.fixture
def links():
    """A link to a file and one to a folder outside, in the folder of uploads."""
    folder = Path(get_upload_folder())
    folder.mkdir(exist_ok=True)
    found = {folder / "link": "/etc/hostname", folder / "folder": "/etc"}
    for link, target in found.items():
        link.symlink_to(target)
    yield
    for link in found:
        link.unlink()


@pytest.mark.parametrize("path", FILES)
def test_the_api_reads_no_file_that_was_not_uploaded(url, links, path):
    path = path.replace("{uploads}", get_upload_folder())
    assert call(url, {"path": path} | META) == {"error": NOT_UPLOADED}
    assert call(url, {"path": path, "url": f"{url}/gradio_api/file={path}", "is_stream": True} | META) == {
        "error": NOT_UPLOADED
    }


def test_no_function_of_the_page_reads_a_photo_that_was_not_uploaded(url, tmp_path):
    photo = tmp_path / "private.jpg"
    photo.write_bytes(PHOTO.read_bytes() + b"private")
    file = {"path": str(photo), "orig_name": "a.jpg", "mime_type": "image/jpeg"} | META
    for number, function in enumerate(functions(url)):
        for kind, value in enumerate((file, [file], [[file, "text"]], {"image": file}, {"files": [file]}, str(photo))):
            message = join(url, function["id"], [value] * len(function["inputs"]), f"path{number}-{kind}")
            assert "words" not in json.dumps(message["output"]), function
    copies = [path for path in Path(get_upload_folder()).rglob("*.*") if path.read_bytes().endswith(b"private")]
    assert not copies


@pytest.mark.parametrize("path", FILES)
def test_no_route_serves_a_file_that_was_not_uploaded(url, links, path):
    path = path.replace("{uploads}", get_upload_folder())
    secret = Path("/etc/hostname").read_text().strip()
    for before in ("gradio_api/file=", "gradio_api/file/", "static/", "assets/", "svelte/", "", "gradio_api/stream/"):
        for encoded in (quote(path), quote(path, safe=""), quote(quote(path, safe=""))):
            status, text = send(url, "GET", f"/{before}{encoded}")
            assert status >= 400, (before, encoded)
            assert text.strip() != secret


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.jpg",
        "/etc/cron.d/evil",
        "..",
        ".",
        "a/../../../evil.jpg",
        "..\\..\\evil.jpg",
        "é" * 200,
        "%2e%2e%2f",
    ],
)
def test_an_upload_stays_in_its_folder_whatever_its_name(url, name):
    before = set(Path(get_upload_folder()).parent.iterdir())
    body, headers = form(PHOTO)
    status, text = send(url, "POST", "/gradio_api/upload", body.replace(b"cat.jpg", name.encode()), **headers)
    if status == 200:
        assert Path(json.loads(text)[0]).resolve().is_relative_to(get_upload_folder())
        assert Path(json.loads(text)[0]).is_file()
    else:
        assert status == 400
    assert set(Path(get_upload_folder()).parent.iterdir()) == before


def test_one_file_that_cannot_be_used_does_not_lose_the_other_files_of_a_request(url, small):
    photo = upload(url, PHOTO)
    files = [photo, LINKS[0], {"path": "/no/such/hostname"} | META, photo]
    function = next(one["id"] for one in functions(url) if one["api_name"] == "caption_batch")
    message = join(url, function, [files, "", 1, 1, 22, False, 1, 0.9, 0], "batch")
    answers = message["output"]["data"][0]
    assert [answer["file"] for answer in answers] == ["cat.jpg", "a.jpg", "hostname", "cat.jpg"]
    assert [answer.get("error") for answer in answers] == [None, LINK, NOT_UPLOADED, None]
    assert answers[0]["caption"] == str(small.caption(PHOTO, beam_size=1))


class Held(Captioner):
    """A captioner that waits until it may go on, and notes how many photos come at a time."""

    def __init__(self, captioner: Captioner) -> None:
        self.__dict__ |= captioner.__dict__
        self.gate, self.sizes = threading.Event(), []

    def caption(self, images, **options):
        self.gate.wait(timeout=60)
        self.sizes.append(len(images))
        return super().caption(images, **options)


def values_that_are_no_settings():
    """Place, value, and what is said of it."""
    odd = [None, "", "5", "many", True, [], [5], {}, {"a": 5}, -1, 0, 1e10, 10**400, float("nan"), float("inf"), -0.5]
    names = {2: "beam size", 3: "number of captions", 4: "maximum length", 6: "temperature", 7: "top-p", 8: "seed"}
    for place, name in names.items():
        for value in odd:
            if not (value == 0 and place == 8 and value is not True):
                yield place, value, f"The {name} should be a "
    for value in (None, "no", 0, 1, [], {}):
        yield 5, value, "Sampling should be true or false"
    for value in (5, [], {}, True):
        yield 1, value, "The model should be a name"


@pytest.mark.parametrize(("place", "value", "reason"), values_that_are_no_settings())
def test_whatever_is_no_setting_gets_a_short_sentence(place, value, reason):
    values = ["", 5, 1, 22, False, 1.0, 0.9, 0]
    values[place - 1] = value
    with pytest.raises(Refused, match=f"^{reason}.{{1,120}}[.]$"):
        settings_of(*values)


def test_a_bad_request_leaves_the_others_of_its_batch_alone(small):
    """All are gathered into one batch, since the first one holds the network."""
    held = Held(small)
    with run_app({"small": held}, queue=500) as url:
        photo = upload(url, PHOTO)
        first = start(url, photo)
        good, bad = [], []
        for place, value, reason in list(values_that_are_no_settings())[::7]:
            bad.append((start(url, photo, (place, value)), reason))
        for odd, reason in (
            (5, NO_FILE),
            ("cat.jpg", NO_FILE),
            ([photo], NO_FILE),
            ({}, "Choose a photo first."),
            (LINKS[0], LINK),
            ({"path": "/etc/hostname"} | META, NOT_UPLOADED),
            (photo | {"size": "large"}, NO_FILE),
            (None, "Choose a photo first."),
        ):
            bad.append((start(url, odd), reason))
            good.append(start(url, photo))
        held.gate.set()
        expected = call(url, photo)
        assert expected["caption"] == str(small.caption(PHOTO))
        assert result(url, first) == expected
        for event in good:
            assert result(url, event)["caption"] == expected["caption"]
        for event, reason in bad:
            error = result(url, event)["error"]
            assert reason in error
            assert "Traceback" not in error
            assert len(error) < 200
    assert max(held.sizes) > 1


def result(url, event):
    """The answer to a request that was started."""
    with urllib.request.urlopen(f"{url}/gradio_api/call/caption/{event}", timeout=60) as answer:
        kind, data = answer.read().decode().strip().splitlines()[-2:]
    assert kind == "event: complete", data
    return json.loads(data.removeprefix("data: "))[0]


DEEP = b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("call/caption", b"no json", 400, "not JSON"),
        ("call/caption", b"\xff", 400, "not JSON"),
        ("call/caption", DEEP, 400, "not JSON"),
        ("call/caption", b'{"data": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        ("call/caption", [], 400, "should be a JSON object"),
        ("call/caption", {}, 400, 'a list "data" of 9 values, not null'),
        ("call/caption", {"data": {}}, 400, "of 9 values"),
        ("call/caption", {"data": [None] * 8}, 400, "of 9 values, not 8"),
        ("call/caption", {"data": [None] * 10}, 400, "of 9 values, not 10"),
        ("call/caption", b" " * (MOST_BYTES + 1), 413, "bytes"),
        ("call/nothing", {"data": []}, 404, "There is no function 'nothing'"),
        ("call/v2/caption", {}, 400, "parameter image is missing"),
        ("call/v2/caption", {"image": None, "zoom": 1}, 400, "no parameter 'zoom'"),
        ("call/v2/nothing", {}, 404, "There is no function 'nothing'"),
        ("queue/join", {"data": [None] * 9, "session_hash": "s"}, 404, "There is no function null"),
        ("queue/join", {"data": [None] * 9, "fn_index": 99, "session_hash": "s"}, 404, "There is no function 99"),
        ("queue/join", {"data": [None] * 9, "fn_index": [1], "session_hash": "s"}, 404, "There is no function"),
        ("queue/join", {"data": [], "fn_index": 0, "session_hash": 5}, 422, "string"),
        ("run/caption", {"data": [None] * 9}, 404, "join the queue"),
        ("api/caption", {"data": [None] * 9}, 404, "join the queue"),
    ],
)
def test_a_call_of_the_wrong_form_gets_a_sentence(url, path, body, status, reason):
    found, text = send(url, "POST", f"/gradio_api/{path}", body)
    assert (found, reason in json.loads(text)["detail"] if status != 422 else reason in text) == (status, True), text
    assert "Traceback" not in text


def test_a_refused_upload_says_why_to_a_client_that_is_still_sending(small, tmp_path):
    heavy = tmp_path / "heavy.jpg"
    heavy.write_bytes(bytes(30_000_000))
    with run_app({"small": small}, max_upload_mb=1) as url, pytest.raises(urllib.error.HTTPError) as refused:
        upload(url, heavy)
    with refused.value as answer:
        assert answer.code == 413
        assert "maximum allowed size" in answer.read().decode()


# --- the disk


def heavy_photo(folder, number, size):
    """A photo of that many bytes, unlike the others."""
    path = folder / f"{number}.jpg"
    photo = PHOTO.read_bytes()
    path.write_bytes(photo + bytes([number]) * (size - len(photo)))
    return path


def disk_use(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_oldest_uploads_make_room_but_not_those_of_a_request_that_waits(small, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    held = Held(small)
    with run_app({"held": held}, max_disk_mb=1) as url:
        first = upload(url, heavy_photo(tmp_path, 0, 300_000))
        event = start(url, first)
        others = [Path(upload(url, heavy_photo(tmp_path, number, 300_000))["path"]) for number in range(1, 7)]
        assert not others[0].exists()
        assert others[-1].exists()
        assert disk_use(tmp_path / "uploads") <= 1024 * 1024 + 300_000
        held.gate.set()
        assert "caption" in result(url, event)
        for number in range(7, 11):
            upload(url, heavy_photo(tmp_path, number, 300_000))
        assert not Path(first["path"]).exists()
        assert call(url, first) == {"error": NOT_UPLOADED}
        samples = [one["props"]["icon"] for one in config(url)["components"] if one["props"].get("icon")]
        assert samples
        for sample in samples:
            assert urllib.request.urlopen(sample["url"]).status == 200


def test_an_upload_is_refused_while_all_files_are_in_use(small, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    held = Held(small)
    with run_app({"held": held}, max_disk_mb=1) as url:
        events = [start(url, upload(url, heavy_photo(tmp_path, number, 600_000))) for number in range(2)]
        with pytest.raises(urllib.error.HTTPError) as refused:
            upload(url, PHOTO)
        with refused.value as answer:
            assert (answer.code, json.load(answer)) == (507, {"detail": FULL})
        held.gate.set()
        assert all("caption" in result(url, event) for event in events)
        assert "caption" in call(url, upload(url, PHOTO))


def test_an_upload_larger_than_all_room_is_broken_off(small, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with run_app({"small": small}, max_disk_mb=1, max_upload_mb=100) as url:
        with pytest.raises(urllib.error.HTTPError) as refused:
            upload(url, heavy_photo(tmp_path, 0, 40_000_000))
        with refused.value as answer:
            assert (answer.code, json.load(answer)) == (507, {"detail": FULL})
    assert disk_use(tmp_path / "uploads") < 20_000_000


def test_pictures_of_a_gallery_stay_while_its_request_runs(small, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    handlers = Handlers(Service({"small": small}))
    uploads = Uploads(tmp_path, build(handlers), handlers.pictures_in_use, 0, 3600)
    updates = handlers.show_many([str(PHOTO)] * 9, [], 1, 1, 5, False, 1, 0.9, 0, progress=lambda *_, **__: None)
    next(updates)
    (picture,) = set(handlers.pictures_in_use())
    assert not asyncio.run(uploads.make_room())
    assert Path(picture).is_file()
    assert len(list(updates)) == 2
    assert asyncio.run(uploads.make_room())
    assert not Path(picture).exists()


# --- who may enter


PASSWORDS = Passwords({"ann": "secret:with colon", "bob": hash_password("häßlich")})
OPEN = {"/", "/health", "/login", "/login/", "/logout", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
OPEN |= {"/assets/{path:path}", "/static/{path:path}", "/svelte/{path:path}", "/pwa_icon"}


@pytest.fixture(scope="module")
def locked(small):
    with run_app({"small": small}, auth=PASSWORDS) as address:
        yield address


def test_without_a_login_only_the_login_page_and_health_answer(locked, small):
    seen = set()
    for method, path in routes(small, auth=PASSWORDS):
        if path in OPEN or (path == "" and method == "GET"):
            seen.add(path)
            continue
        for cookie in ("", "access-token=x; access-token-unsecure=x"):
            status, text = send(locked, method, with_value(path, "0"), {"data": []}, Cookie=cookie)
            assert status == 401, (method, path, text)
    assert seen >= {"/health", "/login", "/"}
    assert "/gradio_api/queue/join" in {path for _, path in routes(small)}
    for path in (
        "/gradio_api/file=/etc/hostname",
        "/gradio_api/call/caption",
        "/gradio_api/new-in-gradio-7",
        "/config//",
    ):
        assert send(locked, "POST", path)[0] == 401
        assert send(locked, "GET", path)[0] == 401
    status, text = send(locked, "GET", "/")
    assert status == 200
    assert send(locked, "GET", "/health")[0] == 200


@pytest.mark.parametrize("encoding", ["", "gzip, br"])
def test_the_login_page_does_not_describe_the_api(locked, url, encoding):
    headers = {"Accept-Encoding": encoding}
    status, text = send(locked, "GET", "/", **headers)
    assert status == 200
    assert '"auth_required":true' in text
    assert text.rstrip().endswith("</html>")
    for word in ("beam", "caption_batch", "max_length"):
        assert word not in text.partition("window.gradio_config")[2]
    client = gradio_client.Client(locked, verbose=False, auth=("ann", "secret:with colon"))
    cookie = "; ".join(f"{key}={value}" for key, value in client.cookies.items())
    with urllib.request.urlopen(urllib.request.Request(locked, headers={"Cookie": cookie})) as page:
        assert "caption_batch" in page.read().decode()


@pytest.mark.parametrize(("name", "password"), [("ann", "secret:with colon"), ("bob", "häßlich")])
def test_those_with_a_password_may_enter_until_they_leave(locked, name, password):
    client = gradio_client.Client(locked, verbose=False, auth=(name, password))
    answer = client.predict(image=gradio_client.handle_file(str(PHOTO)), api_name="/caption")
    assert "caption" in answer
    cookie = "; ".join(f"{key}={value}" for key, value in client.cookies.items())
    assert send(locked, "GET", "/config", Cookie=cookie)[0] == 200
    send(locked, "GET", "/logout", Cookie=cookie)
    assert send(locked, "GET", "/config", Cookie=cookie)[0] == 401


@pytest.mark.parametrize(
    ("name", "password"),
    [("ann", ""), ("ann", "secret"), ("", ""), ("eve", "secret:with colon"), ("bob", "häßlich "), ("ann", "\x00")],
)
def test_a_wrong_password_lets_nobody_in(locked, name, password):
    body = f"username={quote(name)}&password={quote(password)}"
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    status, _ = send(locked, "POST", "/login", body.encode(), **kind)
    assert status in (400, 422)


def test_a_hash_is_no_password():
    text = PASSWORDS.hashes["bob"]
    assert not PASSWORDS.matches("bob", text)
    assert "lich" not in text
    assert hash_password("a") != hash_password("a")
    assert matches("a", hash_password("a"))


def test_a_stranger_waits_as_long_as_somebody_known(monkeypatch):
    derived = []
    real = auth.derive
    monkeypatch.setattr(auth, "derive", lambda *values: derived.append(values[2:]) or real(*values))
    for name in ("ann", "bob", "eve", ""):
        assert not PASSWORDS.matches(name, "wrong")
    assert derived == [(2**14, 8, 1)] * 4


def test_a_line_for_the_file_is_made_from_standard_input(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("top:secret\r\n"))
    assert main(["--hash-password", "eve"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("eve:scrypt$")
    assert "secret" not in line
    path = tmp_path / "people"
    path.write_text(f"# who may enter\n\n{line}ann : plain \n")
    people = Passwords.read(str(path))
    assert people.matches("eve", "top:secret")
    assert people.matches("ann", " plain ")
    assert not people.matches("eve", "secret")
    for name, typed in (("", "a"), ("a:b", "a"), ("#a", "a"), ("eve", "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert main(["--hash-password", name]) == 1
        assert capsys.readouterr().err.startswith("python -m app: ")


@pytest.mark.parametrize(
    "damaged",
    [
        "scrypt$",
        "scrypt$1$2$3",
        "scrypt$15$8$1$YQ==$YQ==",
        "scrypt$1099511627776$8$1$YQ==$YQ==",
        "scrypt$16384$8$1$*$YQ==",
    ],
)
def test_a_damaged_hash_is_named_by_its_line(tmp_path, damaged):
    path = tmp_path / "people"
    path.write_text(f"ann:a\nbob:{damaged}\n")
    with pytest.raises(ValueError, match="line 2: the hash of the password is damaged"):
        Passwords.read(str(path))
    path.write_text("ann:a\nann:b\n")
    with pytest.raises(ValueError, match="line 2: 'ann' has a line already"):
        Passwords.read(str(path))
