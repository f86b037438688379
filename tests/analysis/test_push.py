"""The model card as the hub's own library reads it, and a push to a hub that is a small server on this machine."""

import base64
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.torch import load as load_tensors
from scipy.stats import binomtest

from fastcifar.analysis.push import stage
from fastcifar.errors import UserError
from fastcifar.models import build_model
from tests.command import fastcifar
from tests.run_directories import add_weights, logits_for, make_members, make_run, recipe

COMMIT = "1" * 40


@pytest.fixture
def run(tmp_path, rng):
    labels = rng.integers(10, size=300)
    made = recipe("tiny", title='<b>Tiny</b> "net" ``` ---')
    run = make_run(tmp_path / "run", {"test/labels": labels, "test/last/raw": logits_for(labels, rng, 2.0)}, made)
    add_weights(run, "last", build_model(made.model, seed=1).state_dict())
    return run


def test_the_card_of_a_run_is_written_with_its_summary_and_read_by_the_hubs_library(run):
    hub = pytest.importorskip("huggingface_hub")
    text = (run.folder / "README.md").read_text()
    assert text == run.model_card()
    run.read("README.md")  # its hash is in the manifest
    card = hub.ModelCard(text)
    assert card.data.library_name == "fastcifar"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    accuracy = run.summary["last"]["accuracy"]
    assert card.data.eval_results[0].metric_value == pytest.approx(accuracy / 100, abs=1e-4)
    right = round(accuracy * 3)
    interval = binomtest(right, 300).proportion_ci(method="wilson")
    assert f"| last | {accuracy:.2f} | {100 * interval.low:.2f} to {100 * interval.high:.2f} |" in text
    assert "# &lt;b>Tiny&lt;/b>" in text
    assert "````toml" in text  # a longer fence than what the title holds
    for said in ("a test", "0123456789", "(60.0 s)", "## Limits"):
        assert said in text


def test_the_head_of_a_pushed_card_has_the_accuracy_of_the_pushed_weights(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    best = run.summary["last"] | {"accuracy": 91.0, "epoch": 1}
    run.write_summary(run.summary | {"best": best})
    add_weights(run, "best", run.weights("last"))
    for which, accuracy in {"best": 91.0, "last": run.summary["last"]["accuracy"]}.items():
        folder = tmp_path / which
        folder.mkdir()
        stage(run, folder, which)
        card = hub.ModelCard((folder / "README.md").read_text())
        assert card.data.eval_results[0].metric_value == pytest.approx(accuracy / 100, abs=1e-4)
        assert f"`model.safetensors`, of the {which} epoch, holds" in card.content


def test_a_combination_has_a_card_too(tmp_path):
    from fastcifar.analysis.combine import run_combine
    from fastcifar.config.schema import CombineRecipe

    members = make_members(tmp_path)
    table = {"how": "soft", "members": list(members)}
    run_combine(CombineRecipe.model_validate({"name": "vote", "combine": table}), members, tmp_path / "vote")
    assert "A combination of trained models" in (tmp_path / "vote" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------- a hub


class Hub(BaseHTTPRequestHandler):
    """What `push` asks of a hub: make a repository, say how files are to be sent, take a commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        if self.server.refuse:
            self._answer(403, {"error": "not yours"})
        elif self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            self._answer(200, {"url": f"{self.server.url}/me/{name}", "name": f"me/{name}"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for p in paths]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            address = f"{self.server.url}/me/tiny/commit/{COMMIT}"
            self._answer(200, {"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._answer(404, {"error": f"nothing at {self.path}"})

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization"), b""))
        self._answer(404, {"error": "no such revision"})

    def _answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    pytest.importorskip("huggingface_hub")
    # A machine without a network may say so, or name a proxy; neither is for a server on this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.refuse = [], False
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of-a-test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join(60)


def committed(hub):
    """Return the files of the commit by name."""
    (body,) = [body for path, _, body in hub.asked if "/commit/" in path]
    entries = [json.loads(line) for line in body.decode().splitlines()]
    return {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}


def test_a_push_is_one_commit_of_card_weights_and_records(run, hub, tmp_path):
    done = fastcifar("push", "run", "me/tiny", "--private", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.url}/me/tiny/commit/{COMMIT}"
    files = committed(hub)
    assert sorted(files) == json.loads(done.stdout)["files"]
    assert set(files) == {
        "README.md", "environment.json", "metrics.jsonl", "model.safetensors", "recipe.toml", "summary.json"
    }  # fmt: skip
    assert files["README.md"].decode() == run.model_card(weights="last")
    assert files["metrics.jsonl"] == (run.folder / "metrics.jsonl").read_bytes()
    sent, kept = load_tensors(files["model.safetensors"]), run.weights("last")
    assert all(np.array_equal(sent[name], kept[name]) for name in kept)
    ours = ("/api/repos/", "/api/models/")  # the library asks other things too
    assert {token for path, token, _ in hub.asked if path.startswith(ours)} == {"Bearer hf_of-a-test"}
    made = json.loads(next(body for path, _, body in hub.asked if path == "/api/repos/create"))
    assert made.get("visibility") == "private" or made.get("private")  # as newer and older versions of the library say


@pytest.mark.parametrize(
    ("repo", "refuse", "message"), [("me/tiny", True, "HF_TOKEN"), ("a b//c", False, "is no name")]
)
def test_a_refusal_is_one_message(run, hub, tmp_path, repo, refuse, message):
    hub.refuse = refuse
    done = fastcifar("push", "run", repo, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_goes_wrong_before_the_hub_is_asked_is_not_its_fault(run, hub, tmp_path, monkeypatch):
    from fastcifar.analysis import push

    def fail(*_):
        raise RuntimeError("of an exporter")

    monkeypatch.setattr(push, "export_onnx", fail)
    with pytest.raises(RuntimeError, match="of an exporter"):
        push.push(run, "me/tiny", onnx=True)
    with pytest.raises(UserError, match=r"gone: cannot be written: No such file or directory; .*TMPDIR"):
        push.stage(run, tmp_path / "gone")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    done = fastcifar("push", "run", "me/tiny", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be written: No such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert hub.asked == []


def test_a_hub_that_does_not_answer_is_one_message(run, hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    done = fastcifar("push", "run", "me/tiny", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
