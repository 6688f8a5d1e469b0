"""docs/deploy.md keeps its word: every command, page and block runs, with stand-ins for the hub, Triton and the CDN."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "deploy.md").read_text("utf-8")
PYTHON = re.findall(r"(?ms)^```python\n(.*?)^```$", TEXT)
PROSE = re.sub(r"(?ms)^```\w+\n.*?^```$", "", TEXT)
COMMANDS = [re.sub(r"\s+#.*", "", line.strip()) for line in re.findall(r"(?m)^    \S.*", PROSE)]
PREPARE, CONFIG, REQUEST, PROGRAM, COMPILED, FROM_HUB = PYTHON


def commands(start: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(start)]


def test_nothing_is_left_out():
    assert TEXT.count("```python") == len(PYTHON)
    assert {command.split()[0] for command in COMMANDS} == {"vit", "docker", "python"}


@pytest.fixture(scope="module")
def place(small_bundle, photographs, tmp_path_factory) -> Path:
    """A folder with what the page speaks of; the data that the model names is there."""
    folder = tmp_path_factory.mktemp("deploy")
    for first, name in enumerate(("cat", "dog")):
        (folder / "photos" / name).mkdir(parents=True)
        for turned in range(first, 6, 2):
            for path in photographs:
                Image.open(path).rotate(30 * turned).save(folder / "photos" / name / f"{turned}_{path.name}")
    shutil.copytree(photographs[0].parent, folder / "more")
    shutil.copytree(small_bundle, folder / "bundle")
    # on its side, as a camera would have it
    image = Image.open(photographs[3])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "photo.jpg", exif=exif)
    return folder


def run(place: Path, program: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def vit(place: Path, *calls: str, **environment: str) -> str:
    program = (
        "import json, shlex, sys\nfrom vit.cli import main\n"
        "for call in json.loads(sys.argv[1]):\n    assert main(shlex.split(call)[1:]) == 0, call"
    )
    return run(place, program, json.dumps([call.replace("MODEL", "bundle") for call in calls]), **environment)


@pytest.fixture(scope="module")
def exported(place) -> Path:
    calls = [*commands("vit export"), *commands("vit info")]
    assert len(calls) >= 8
    told = vit(place, *calls)
    assert "compared with torch on 8 images (folder, test split)" in told
    assert "top-1 accuracy: " in told
    assert "int8.agreement" in told
    for name in ("model.onnx", "explained.onnx", "small.onnx", "model.pt2", "triton/flowers/1/model.onnx"):
        assert (place / name).is_file()
    assert sorted(os.listdir(place / "site" / "model")) == [
        "README.md",
        "config.json",
        "model.onnx",
        "model.safetensors",
    ]
    return place


WITHOUT = "import sys\nfor name in ('torch', 'vit', 'timm'): sys.modules[name] = None\n"


def test_onnxruntime_alone_gives_the_rows_of_vit_classify(exported, photographs):
    """All of the photographs, whichever side is the longer, by the page's own `prepare`."""
    again = PREPARE[PREPARE.index("(logits,)") :].replace('"photo.jpg"', "path").replace("\n", "\n    ")
    program = f"{WITHOUT}{PREPARE}\nfor path in sys.argv[1:]:\n    {again}"
    paths = [exported / "photo.jpg", *photographs]
    shown = run(exported, program, *map(str, paths)).splitlines()[1:]
    rows = vit(exported, shlex.join(["vit", "classify", "bundle", *map(str, paths), "--format", "jsonl"])).splitlines()
    assert len(rows) == len(shown) == len(paths)
    for line, row in zip(shown, map(json.loads, rows), strict=True):
        label, _, probability = line.rpartition(" ")
        assert label == row["label"]
        assert float(probability) == pytest.approx(row["probability"], abs=2e-4)  # the page rounds to 1e-4


@pytest.fixture
def triton(exported) -> Iterator[str]:
    """What answers as Triton does: one request of its HTTP protocol, on the repository's file.  Its host and port.

    Facts: https://kserve.github.io/website/latest/modelserving/data_plane/v2_protocol/, "Inference request".
    """
    from vit.inference.onnx_backend import open_session

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            _, models, name, action = self.path.strip("/").split("/")
            assert (models, action) == ("models", "infer")
            (given,) = asked["inputs"]
            assert given["datatype"] == "FP32"
            session = open_session(exported / "triton" / name / "1" / "model.onnx")
            names = [each["name"] for each in asked["outputs"]]
            images = np.array(given["data"], np.float32).reshape(given["shape"])
            outputs = session.run(names, {given["name"]: images})
            body = json.dumps(
                {
                    "model_name": name,
                    "outputs": [
                        {"name": key, "datatype": "FP32", "shape": list(each.shape), "data": each.ravel().tolist()}
                        for key, each in zip(names, outputs, strict=True)
                    ],
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def model_config(text: str) -> Any:
    """A `config.pbtxt`, read as protobuf's text format.

    The part of `ModelConfig` that the page uses; names and kinds are from
    https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    Field = descriptor_pb2.FieldDescriptorProto
    one, many = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    kinds = file.enum_type.add(name="DataType")
    for number, name in ((0, "TYPE_INVALID"), (11, "TYPE_FP32")):
        kinds.value.add(name=name, number=number)
    for name, dims in (("ModelInput", 4), ("ModelOutput", 3)):
        made = file.message_type.add(name=name)
        made.field.add(name="name", number=1, label=one, type=Field.TYPE_STRING)
        made.field.add(name="data_type", number=2, label=one, type=Field.TYPE_ENUM, type_name=".inference.DataType")
        made.field.add(name="dims", number=dims, label=many, type=Field.TYPE_INT64)
    made = file.message_type.add(name="ModelDynamicBatching")
    made.field.add(name="max_queue_delay_microseconds", number=2, label=one, type=Field.TYPE_UINT64)
    made = file.message_type.add(name="ModelConfig")
    for name, number, kind in (("name", 1, Field.TYPE_STRING), ("max_batch_size", 4, Field.TYPE_INT32)):
        made.field.add(name=name, number=number, label=one, type=kind)
    made.field.add(name="backend", number=17, label=one, type=Field.TYPE_STRING)
    for name, number, label, kind in (
        ("input", 5, many, "ModelInput"),
        ("output", 6, many, "ModelOutput"),
        ("dynamic_batching", 11, one, "ModelDynamicBatching"),
    ):
        made.field.add(name=name, number=number, label=label, type=Field.TYPE_MESSAGE, type_name=f".inference.{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


def test_tritons_repository_is_laid_out_and_a_request_is_answered(exported, triton):
    run(exported, WITHOUT + CONFIG)
    config = model_config((exported / "triton" / "flowers" / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("flowers", "onnxruntime", 64)
    nodes = [(node.name, node.data_type, list(node.dims)) for node in (*config.input, *config.output)]
    assert nodes == [("image", 11, [3, 32, 32]), ("logits", 11, [5]), ("rollout", 11, [4, 4])]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    answer = run(exported, WITHOUT + PREPARE + REQUEST.replace("localhost:8000", triton))
    first, last = answer.splitlines()
    assert first.rpartition(" ")[0] == last


def test_the_container_gets_the_repository(exported, tmp_path):
    """A `docker` that only looks: at what is mounted, and that the server is told the same place."""
    (command,) = commands("docker")
    (tmp_path / "docker").write_text('#!/bin/sh\nfor each in "$@"; do printf "%s\\n" "$each"; done\n')
    (tmp_path / "docker").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=exported,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    words = done.stdout.splitlines()
    here, _, there = words[words.index("-v") + 1].partition(":")
    assert f"--model-repository={there}" in words
    assert words[words.index("-p") + 1] == "8000:8000"
    assert Path(here) == exported / "triton"


def test_the_program_runs_without_vit(exported):
    program = "import sys\nsys.modules['vit'] = None\n" + PREPARE + PROGRAM
    first, last = run(exported, program).splitlines()
    assert first.rpartition(" ")[0] == last


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
def test_the_program_is_compiled(exported, tmp_path):
    shutil.copy(exported / "photo.jpg", tmp_path)
    shutil.copy(exported / "model.onnx", tmp_path)
    shutil.copy(exported / "model.pt2", tmp_path)
    assert "torch.Size([1, 5])" in run(tmp_path, PREPARE + COMPILED)


def test_the_hub(exported, hub, hub_environment):
    own = {"HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
    environment = {key: value for key, value in hub_environment.items() if key.startswith("HF_")} | own
    calls = [*commands("vit push"), *commands("vit classify")]
    assert len(calls) == 4
    told = vit(exported, *calls, **environment)
    assert "nothing was sent" in told
    assert hub.messages[-2] == "First flowers"
    assert {"main", "tried"} <= hub.repositories["me/flowers"].keys()
    assert "me/flowers" in hub.private
    run(exported, FROM_HUB, **environment)


STUB = """
window.ort = {
  Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } },
  InferenceSession: {
    create: async (address) => {
      await (await fetch(address)).arrayBuffer();
      return {
        run: async ({ image }) => {
          const asked = { dims: image.dims, data: Array.from(image.data) };
          const answer = await fetch("run", { method: "POST", body: JSON.stringify(asked) });
          return { logits: { data: Float32Array.from(await answer.json()) } };
        },
      };
    },
  },
};
"""
"""In place of ONNX Runtime Web: the same interface, computed by ONNX Runtime here."""


@pytest.fixture
def site(exported) -> Iterator[str]:
    """The page and its files, served by the page's own command on a free port; its address."""
    (html,) = re.findall(r"(?ms)^```html\n(.*?)^```$", TEXT)
    (exported / "site" / "index.html").write_text(html, encoding="utf-8")
    (command,) = commands("python")
    words = [sys.executable, "-u", *shlex.split(command)[1:3], "0", *shlex.split(command)[3:], "--bind", "127.0.0.1"]
    process = subprocess.Popen(words, cwd=exported, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.search(r"port (\d+)", process.stdout.readline())
    assert found
    yield f"http://127.0.0.1:{found[1]}/"
    process.terminate()
    process.wait(20)


def test_the_web_page_answers_in_a_browser(exported, site, photographs, tmp_path):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium on the path: apt-get install chromium")
    from vit.inference.onnx_backend import open_session

    session = open_session(exported / "site" / "model" / "model.onnx")

    def compute(route: Any) -> None:
        asked = json.loads(route.request.post_data)
        (logits,) = session.run(["logits"], {"image": np.array(asked["data"], np.float32).reshape(asked["dims"])})
        route.fulfill(json=logits[0].tolist())

    # of the model's own size, so that nobody has to resize
    Image.open(photographs[5]).resize((32, 32)).save(tmp_path / "own.png")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route(
            re.compile("cdn.jsdelivr.net"), lambda route: route.fulfill(body=STUB, content_type="text/javascript")
        )
        page.route(re.compile("/run$"), compute)
        page.goto(site)
        page.wait_for_function("document.querySelector('input').onchange !== null")
        page.set_input_files("input", tmp_path / "own.png")
        page.wait_for_function("document.querySelector('#answer').textContent.includes('%')")
        answer = page.inner_text("#answer")
        browser.close()
    row = json.loads(
        vit(exported, shlex.join(["vit", "classify", "bundle", str(tmp_path / "own.png"), "--format", "jsonl"]))
    )
    label, _, share = answer.rpartition(", ")
    assert not errors
    assert label == row["label"]
    assert float(share.rstrip("%")) == pytest.approx(100 * row["probability"], abs=0.06)
