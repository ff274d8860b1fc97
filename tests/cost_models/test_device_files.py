"""Device files: what is read, what is refused and how it is said, and that nothing else ever comes out."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from attnc.cost_models.device import Cpu, Device, Gpu, answers_to, device_named, gpu_named, load_devices
from attnc.errors import UsageError

ARCH = """[arch.sm77]
target = "cuda:77"
capability = "7.7"
warps_per_sm = 64
warp_size = 32
blocks_per_sm = 32
registers_per_sm = 65536
shared_per_sm = 102400
shared_per_block = 101376
l1_bytes = 131072
exp2_per_clock = 16
fma_per_clock = 128
shared_bytes_per_clock = 128
matrix = "mma.sync"
limits_source = "nobody"
limits_unsure = ["exp2_per_clock"]
"""
GPU = """[mine]
title = "My GPU"
arch = "sm77"
also = ["MY GPU 24GB"]
sms = 80
clock_hz = 1.9e9
tensor_clock_hz = 1.7e9
fp32_flops = 40e12
tensor = { bf16 = 160e12, fp16 = 160e12, fp8 = 320e12 }
matmul_seen = { bf16 = 120e12 }
l2_bytes = 41943040
memory_bytes = 24e9
bandwidth = 9e11
link_bytes = 0
host_bytes = 32e9
power_w = 300
unsure = ["sms", "tensor.fp8"]
source = { figures = "measured", power = "the label" }
"""
LIKE = """[slow]
title = "H100 at 350 W"
like = "h100"
clock_hz = 1.2e9
tensor_clock_hz = 1.1e9
power_w = 350
source = { figures = "nvidia-smi" }
"""
CPU = """[box]
kind = "cpu"
bandwidth = 1e10
bandwidth_threads = 2
matmul = 1e11
exps = 1e9
launch_s = 1e-5
dtype_speed = { bfloat16 = 2.0 }
source = { figures = "measured" }
""" + "".join(
    f"[box.engines.{name}]\nrate = 1e11\nelements = 1e9\nlaunch_s = 1e-5\n"
    for name in ("flash", "masked", "flex", "flex_scored", "composed", "composed_scored", "memory")
)
WHOLE = ARCH + GPU + LIKE + CPU


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str | bytes) -> Path:
        path = tmp_path / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path

    return written


def test_a_file_adds_devices_to_the_known_ones(write) -> None:
    path = write(WHOLE)
    devices = load_devices(path)
    assert list(devices) == ["mine", "slow", "box"]
    mine, slow, box = devices.values()
    assert isinstance(mine, Gpu) and isinstance(slow, Gpu) and isinstance(box, Cpu)
    assert (mine.target, mine.shared_per_block, mine.tensor["fp8"], mine.sms) == ("cuda:77", 101376, 320e12, 80)
    assert device_named("my gpu 24gb", file=path) == mine == gpu_named("mine", file=path)
    assert device_named("h100", file=path) == device_named("h100")
    two = device_named("box", 2, file=path)
    assert isinstance(two, Cpu) and two.bandwidth == 2e10 == device_named("box", 8, file=path).bandwidth


def test_a_name_may_be_a_file_with_a_device(write) -> None:
    path = write(WHOLE)
    file, own = str(path), load_devices(path)
    assert device_named(f"{file}:mine") == gpu_named(f"{file}:My GPU 24GB") == own["mine"]
    assert device_named(f"{file}:box", 2) == device_named("box", 2, file=path)
    assert device_named(str(write(ARCH + GPU))) == own["mine"], "the only one needs no name, and a new file is read"
    assert gpu_named(str(write(ARCH + GPU.replace("sms = 80", "sms = 40")))).sms == 40


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (WHOLE, "", r"found 3 devices in .*mine\.toml: mine, slow, box; allowed is one. Write .*mine\.toml:mine\."),
        (WHOLE, ":", "found 3 devices"),
        (WHOLE, ":h100", r"no such device in .*mine\.toml; it has mine, slow, box\."),
        (WHOLE, ":mime", "Did you mean 'mine'"),
        ("", "", r"found no device in .*mine\.toml"),
        (GPU, "", "device mine: arch: found 'sm77'"),
    ],
)
def test_a_file_that_names_no_device_is_a_sentence(write, text: str, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        device_named(f"{write(text)}{name}")


def test_a_file_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^mine\.toml: found no TOML that can be read"):
        device_named("mine.toml")
    with pytest.raises(UsageError, match=r"or name a device file, as my_gpu\.toml"):
        device_named("quantum")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LIKE.replace("[slow]", "[h200]"), "device h200: found the name of a device that attnc knows; allowed is one"),
        (CPU.replace("[box", "[cpu"), "device cpu: found the name of a device that attnc knows"),
        (ARCH.replace("sm77", "sm90"), "arch sm90: found the name of an architecture that attnc knows"),
    ],
)
def test_what_is_known_is_not_defined_anew(write, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_devices(write(text))


def test_a_gpu_of_a_file_answers_to_its_own_names(write) -> None:
    mine = gpu_named("mine", file=write(WHOLE))
    assert answers_to(mine, "NVIDIA My GPU 24GB", (7, 7)) and answers_to(mine, "my gpu")
    assert not answers_to(mine, "NVIDIA My GPU 24GB", (9, 0)) and not answers_to(mine, "NVIDIA H100")
    assert not answers_to(device_named("cpu"), "cpu")


def test_like_takes_figures_over_but_not_names_and_documents(write) -> None:
    slow, h100 = gpu_named("slow", file=write(LIKE)), gpu_named("h100")
    assert (slow.tensor, slow.bandwidth, slow.target) == (h100.tensor, h100.bandwidth, h100.target)
    assert (slow.clock_hz, slow.power_w) == (1.2e9, 350)
    assert not slow.also and not slow.matmul_seen and dict(slow.source) == {"figures": "nvidia-smi"}
    cpu = device_named("twin", 1, file=write('[twin]\nlike = "cpu"\nbandwidth = 2e10\nsource = { figures = "me" }\n'))
    assert isinstance(cpu, Cpu) and cpu.bandwidth == 2e10 and cpu.engines == device_named("cpu", 1).engines


WRONG = [
    ("sms = 80", "smss = 80", "device mine: found the key 'smss'; allowed are .* Did you mean 'sms'"),
    ("sms = 80", "", r"device mine: found no sms\. Add sms, a whole number from 1 to 4096 SMs"),
    ("sms = 80", "sms = -80", "device mine: sms: found -80, allowed is a whole number from 1 to 4096 SMs"),
    ("sms = 80", "sms = 80.0", r"sms: found 80\.0, allowed is a whole number"),
    ("sms = 80", "sms = true", "sms: found True"),
    ("sms = 80", f"sms = {'9' * 4000}", "sms: found a whole number of over 30 digits"),
    ("sms = 80", f"sms = {'9' * 5000}", "found no TOML that can be read"),
    ("bandwidth = 9e11", "bandwidth = 900", r"bandwidth: found 900, allowed is a number from 1e\+08 to 1e\+15 bytes/s"),
    ("bandwidth = 9e11", "bandwidth = nan", "bandwidth: found nan"),
    ("bandwidth = 9e11", "bandwidth = inf", "bandwidth: found inf"),
    ("bandwidth = 9e11", 'bandwidth = "9e11"', "bandwidth: found '9e11'"),
    ("bandwidth = 9e11", "bandwidth = 2020-01-01", "bandwidth: found datetime"),
    ("bf16 = 160e12", "bf17 = 160e12", "tensor: found the key 'bf17'; .*Did you mean 'bf16'"),
    ("bf16 = 160e12", "bf16 = 160", r"tensor\.bf16: found 160, allowed is"),
    ("bf16 = 160e12, fp16 = 160e12", "tf32 = 160e12", "tensor: found tf32, fp8, needed is bf16 or fp16"),
    ("tensor = {", "tensor = 3 #", "tensor: found 3, allowed is a table of fp32, tf32"),
    (
        "matmul_seen = { bf16 = 120e12 }",
        "matmul_seen = { bf16 = 170e12 }",
        r"allowed is at most tensor\.bf16, 1.6e\+14",
    ),
    (
        "tensor_clock_hz = 1.7e9",
        "tensor_clock_hz = 2e9",
        "tensor_clock_hz: found 2e.09 Hz, allowed is at most clock_hz",
    ),
    ('arch = "sm77"', 'arch = "sm91"', "arch: found 'sm91', allowed are .*Did you mean 'sm90'"),
    ('arch = "sm77"', "arch = 77", "arch: found '77', allowed are"),
    ('"tensor.fp8"]', '"tensor.fp4"]', "unsure: found 'tensor.fp4', allowed are names of fields"),
    ('also = ["MY GPU 24GB"]', 'also = "MY GPU"', "also: found 'MY GPU', allowed is a list of texts"),
    ('title = "My GPU"', 'title = ""', "title: found '', allowed is a text of 1 to 400 characters"),
    ('title = "My GPU"', r'title = "a\u001bb"', "title: found 'a.x1bb', allowed is a text"),
    ('power = "the label"', 'label = "x"', "source: found the key 'label'; allowed are figures"),
    ('figures = "measured", power', "figures = 3, power", r"source\.figures: found 3"),
    ("[mine]", "[MINE]", "found the name 'MINE'; allowed are 1 to 40 of a-z"),
    ("[mine]", '["../x"]', "found the name '../x'"),
    ('like = "h100"', 'like = "h1000"', "device slow: like: found 'h1000', allowed is a device that .*mean 'h100'"),
    ('like = "h100"', 'like = "box"', "like: found 'box', allowed is a device that stands before it"),
    ('kind = "cpu"', 'kind = "tpu"', "kind: found 'tpu', allowed is one of gpu, cpu"),
    ('kind = "cpu"', 'kind = ["cpu"]', "kind: found .'cpu'., allowed is one of gpu, cpu"),
    ("[box.engines.flash]", "[box.engines.flush]", "engines: found flush, .*needed are flash"),
    ("launch_s = 1e-5\ndtype", "launch_s = -1\ndtype", "launch_s: found -1, allowed is a number from 0 to 1 s"),
    ("bfloat16 = 2.0", "bf16 = 2.0", "dtype_speed: found the key 'bf16'; .*Did you mean 'bfloat16'"),
    (
        'target = "cuda:77"',
        'target = "cuda 77"',
        "arch sm77: target: found 'cuda 77', allowed is a text .* of the form",
    ),
    ('target = "cuda:77"', "", "arch sm77: found neither of target and no_target"),
    ("shared_per_block = 101376", "shared_per_block = 102401", "found 102401 bytes, allowed is at most shared_per_sm"),
    ('limits_unsure = ["exp2_per_clock"]', 'limits_unsure = ["exp2"]', "limits_unsure: found 'exp2'"),
    ("[arch.sm77]", "[arch]\nx = 3\n[arch.sm77]", "arch x: found 3, allowed is a table"),
    ("[arch.sm77]", "sm = 3\n[arch.sm77]", "device sm: found 3, allowed is a table"),
    ("[arch.sm77]", "[arch.sm77", "found no TOML that can be read"),
    ("[arch.sm77]", "x = " + "[" * 5000 + "\n", "found no TOML that can be read"),
]


@pytest.mark.parametrize(("old", "new", "says"), WRONG, ids=lambda text: text[:30])
def test_what_is_wrong_is_named_with_what_is_allowed(write, old: str, new: str, says: str) -> None:
    assert WHOLE.count(old) >= 1
    path = write(WHOLE.replace(old, new, 1))
    with pytest.raises(UsageError, match=says) as raised:
        load_devices(path)
    assert str(raised.value).startswith(f"{path}: ") and len(str(raised.value)) < 2500


def test_what_is_no_file_of_text_is_a_sentence(write, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.toml", write(b"\xff\xfe"), write(b"\x00"), Path("a\0b")):
        with pytest.raises(UsageError, match="found no TOML that can be read"):
            load_devices(path)
    with pytest.raises(UsageError, match="found over 1048576 bytes"):
        load_devices(write("#" * (1 << 21)))
    assert load_devices(write("")) == {}


# Mutations.

VALUES = (
    *("-1", "0", "1e400", "-inf", "nan", "true", '"text"', "[]", "{}", "[[1]]", "2020-01-01", "0x10", "1_000", "''"),
    *("9" * 40, "1e12", '"h100"', '"cpu"', '["sms"]', "{ bf16 = 1e12 }", '"\\u0000"', "'''a\nb'''", "1.0", "-0.0"),
)


def mutated(draw: random.Random) -> str | bytes:
    """The file with one to three changes of lines, values or bytes, half of them mild ones of a value."""
    lines = WHOLE.splitlines()
    for _ in range(draw.randint(1, 3)):
        at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
        change = draw.choice((0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6))
        if change == 0:
            del lines[at]
        elif change == 1:
            lines.insert(to, lines[at])
        elif change == 2:
            lines[at], lines[to] = lines[to], lines[at]
        elif change == 3:
            lines[at] = f"{lines[at].partition('=')[0]}= {draw.choice(VALUES)}"
        elif change == 4:
            lines[at] = f"{lines[to].partition('=')[0]}={lines[at].partition('=')[2]}"
        elif change == 6:
            lines[at] = re.sub(r"\d+(?=[.e]|$)", lambda m: str(int(m[0]) * draw.randint(1, 4) // 2), lines[at])
        else:
            numbers = [str(draw.choice((0, 1, 7, 10**6, 10**20, -3, 0.5))) for _ in range(9)]
            lines[at] = re.sub(r"\d+", lambda _, n=numbers: draw.choice(n), lines[at])
    data = "\n".join(lines).encode()
    if draw.random() < 0.2:
        cut = draw.randrange(len(data))
        data = data[:cut] + draw.randbytes(draw.randint(0, 3)) + data[cut + draw.randint(0, 20) :]
    return data


def test_a_thousand_mutated_files_give_a_sentence_or_devices(write) -> None:
    draw, read, refused = random.Random(4), 0, 0
    for _ in range(1000):
        path = write(mutated(draw))
        try:
            devices = load_devices(path)
        except UsageError as exc:
            refused += 1
            said = str(exc)
            assert said.startswith(f"{path}: ") and said.isprintable() and len(said) < 2500
            continue
        read += 1
        for device in devices.values():
            assert isinstance(device, Device) and device.bandwidth > 0
            if isinstance(device, Gpu):
                assert device.sms >= 1 and device.ridge() > 0 and 0 < device.matmul_share() <= 1
                assert device.tensor_clock_hz > 0 and device.exp2_rate > 0
            else:
                assert device.engine("flash").rate > 0
    assert refused > 300 and read > 150, f"read {read}, refused {refused}"
