"""Model files that try to run code: each is refused in one line, and nothing runs.

Every payload tries to create a marker file; the proof is that it is absent.
`test_the_payload_works` shows that it would be there, had anything been run.
"""

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from audit.errors import NetworkError, UntrustedPickleError
from audit.networks import open_network
from audit.networks.exported import _tensors_only


class Payload:
    """Creates the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.convolution(images)).mean((2, 3)))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def program_bytes() -> bytes:
    exported = torch.export.export(
        Tiny().eval(), (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def refused(path: Path, marker: Path) -> str:
    with pytest.raises(NetworkError) as caught:
        open_network(str(path), arch="torchvision:resnet18")
    assert not marker.exists(), f"{path.name} ran its payload"
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    if not isinstance(caught.value, UntrustedPickleError):
        assert path.name.startswith("other"), message
    return message


def rewritten(
    data: bytes, path: Path, change: Callable[[str, bytes], bytes], **added: bytes
) -> Path:
    """Write the archive with each part changed; torch's reader wants its parts uncompressed."""
    writer = torch._C.PyTorchFileWriter(str(path))
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    for name in reader.get_all_records():
        if not name.startswith(".data/") and name not in ("byteorder", "version"):
            content = change(name, reader.get_record(name))
            writer.write_record(name, content, len(content))
    for name, content in added.items():
        writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    return path


def pickled(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": payload}, buffer)
    return buffer.getvalue()


def test_the_payload_works(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_a_pickled_module_is_refused_with_reason_and_remedy(tmp_path: Path, marker: Path) -> None:
    module = Tiny()
    module.hook = Payload(marker)
    torch.save(module, tmp_path / "module.pt")
    message = refused(tmp_path / "module.pt", marker)
    assert "can run any code when it is loaded" in message
    assert "torch.save(model.state_dict(), path)" in message
    assert "--trust-pickle" in message


def test_an_object_hidden_among_tensors_is_refused(tmp_path: Path, marker: Path) -> None:
    state = {"state_dict": Tiny().state_dict(), "epoch": Payload(marker)}
    torch.save(state, tmp_path / "state.pt")
    refused(tmp_path / "state.pt", marker)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_bare_pickle_is_refused(tmp_path: Path, marker: Path, protocol: int) -> None:
    name = "other.pt" if protocol == 0 else "bare.pt"  # protocol 0 is text without a signature
    (tmp_path / name).write_bytes(pickle.dumps(Payload(marker), protocol))
    refused(tmp_path / name, marker)


def test_the_formats_of_old_torch_versions_are_refused(tmp_path: Path, marker: Path) -> None:
    torch.save(
        {"w": Payload(marker)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False
    )
    refused(tmp_path / "legacy.pth", marker)
    with tarfile.open(tmp_path / "other.pth", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Payload(marker))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    refused(tmp_path / "other.pth", marker)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_a_remedy(tmp_path: Path, marker: Path) -> None:
    torch.jit.save(torch.jit.script(Tiny()), tmp_path / "other.pt")
    assert "TorchScript" in refused(tmp_path / "other.pt", marker)


def test_a_card_is_data(tmp_path: Path, marker: Path) -> None:
    torch.save(Tiny().state_dict(), tmp_path / "other.pt")
    (tmp_path / "other.toml").write_text(f'arch = "__import__({str(marker)!r})"')
    with pytest.raises(NetworkError):
        open_network(str(tmp_path / "other.pt"))
    assert not marker.exists()


def weight_as_pickle(name: str, content: bytes, payload: bytes) -> bytes:
    if name.endswith("weights_config.json"):
        config = json.loads(content)
        for entry in config["config"].values():
            entry["use_pickle"] = True
        return json.dumps(config).encode()
    return payload if name.startswith("data/weights/weight_") else content


def test_pickled_tensors_of_a_program_are_refused(
    tmp_path: Path, marker: Path, program_bytes: bytes
) -> None:
    payload = pickled(Payload(marker))
    path = tmp_path / "weights.pt2"
    rewritten(program_bytes, path, lambda name, c: weight_as_pickle(name, c, payload))
    refused(path, marker)


def test_pickled_sample_inputs_of_a_program_are_refused(
    tmp_path: Path, marker: Path, program_bytes: bytes
) -> None:
    payload = pickled(Payload(marker))
    path = tmp_path / "samples.pt2"
    rewritten(program_bytes, path, lambda n, c: payload if "sample_inputs" in n else c)
    refused(path, marker)


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0", "../weights/weight_0"])
def test_objects_among_the_constants_of_a_program_are_refused(
    tmp_path: Path, marker: Path, program_bytes: bytes, kind: str
) -> None:
    entry = {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"thing": entry}}).encode()
    path = rewritten(
        program_bytes,
        tmp_path / "constants.pt2",
        lambda name, content: config if name.endswith("constants_config.json") else content,
        **{f"data/constants/{kind}": pickle.dumps(Payload(marker))},
    )
    refused(path, marker)


@pytest.mark.parametrize("part", ["weights", "constants"])
def test_the_older_layout_of_programs_is_read_without_objects(
    tmp_path: Path, marker: Path, program_bytes: bytes, part: str
) -> None:
    path = rewritten(
        program_bytes,
        tmp_path / "legacy.pt2",
        lambda _, content: content,
        **{f"data/{part}/model.pt": pickled(Payload(marker))},
    )
    refused(path, marker)


def test_compiled_libraries_in_a_program_are_refused(
    tmp_path: Path, marker: Path, program_bytes: bytes
) -> None:
    path = rewritten(
        program_bytes,
        tmp_path / "compiled.pt2",
        lambda _, content: content,
        **{"data/aotinductor/model/code.so": b"\x7fELF"},
    )
    assert "aotinductor" in refused(path, marker)


def injected(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


GRAPH_ATTACKS: dict[str, Callable[[dict[str, Any], str], None]] = {}


def attack(function: Callable[[dict[str, Any], str], None]) -> Callable[..., None]:
    GRAPH_ATTACKS[function.__name__] = function
    return function


@attack
def shape_expression(program: dict[str, Any], code: str) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    values["x" if "x" in values else "images"]["sizes"][0]["as_expr"]["expr_str"] = code


@attack
def symbol_of_a_range(program: dict[str, Any], code: str) -> None:
    program["range_constraints"] = {code: {"min_val": 2, "max_val": 9}}


@attack
def operator_of_a_node(program: dict[str, Any], code: str) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.serialization.os.system"
    node["inputs"] = [{"name": "", "arg": {"as_string": "touch marker"}, "kind": 1}]


@attack
def operator_that_opens_files(program: dict[str, Any], code: str) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.ops.aten.from_file.default"


@attack
def name_of_an_input(program: dict[str, Any], code: str) -> None:
    text = json.dumps(program)
    text = text.replace('"name": "images"', '"name": ' + json.dumps(f"images={code}"))
    program.clear()
    program.update(json.loads(text))


@attack
def name_of_an_argument(program: dict[str, Any], code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["forward_arg_names"] = [f"images={code}"]


@attack
def type_of_the_inputs(program: dict[str, Any], code: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    tree = {
        "type": "collections.defaultdict",
        "context": json.dumps(
            {
                "default_factory_module": "antigravity",
                "default_factory_name": "x",
                "dict_context": [],
            }
        ),
        "children_spec": [],
    }
    signature["in_spec"] = json.dumps([1, tree])


@pytest.mark.parametrize("name", GRAPH_ATTACKS)
def test_code_in_the_text_of_a_program_is_refused(
    tmp_path: Path,
    marker: Path,
    program_bytes: bytes,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(part: str, content: bytes) -> bytes:
        if part != "models/model.json":
            return content
        program = json.loads(content)
        before = json.dumps(program)
        GRAPH_ATTACKS[name](program, injected(marker))
        assert json.dumps(program) != before, "the attack changed nothing"
        return json.dumps(program).encode()

    prefix = "other" if name == "operator_of_a_node" else "graph"
    path = rewritten(program_bytes, tmp_path / f"{prefix}.pt2", change)
    refused(path, marker)


def test_guards_of_a_program_are_dropped_and_never_compiled(
    tmp_path: Path, marker: Path, program_bytes: bytes
) -> None:
    def change(part: str, content: bytes) -> bytes:
        if part != "models/model.json":
            return content
        return json.dumps({**json.loads(content), "guards_code": [injected(marker)]}).encode()

    network = open_network(str(rewritten(program_bytes, tmp_path / "guards.pt2", change)))
    network.program.logits(torch.zeros(3, 3, 16, 16))
    network.program.exported.module()(torch.zeros(3, 3, 16, 16))
    assert not marker.exists()


def test_an_unknown_archive_is_refused(tmp_path: Path, marker: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_state_dict.pt", pickled(Payload(marker)))
        archive.writestr("serialized_exported_program.json", "{}")
    refused(tmp_path / "other.pt2", marker)


def test_the_restriction_wins_over_callers_and_leaves_no_trace(
    marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with _tensors_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(pickled(Payload(marker))), weights_only=False)
    assert not marker.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(io.BytesIO(pickled(Payload(marker))), weights_only=False)
    assert marker.exists()
