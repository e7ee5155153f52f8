"""Speed and memory of foveal's architectures beside timm's nearest equals; writes docs/benchmarks.md.

    python benchmarks/architectures.py [--only PATTERN,...] [--compile] [--limit SECONDS] [--record FILE]

Each row comes from processes of its own, so that its peak memory is nobody else's. Architecture and neighbour are timed
in turns, each in the memory format that it is faster in. What was measured is kept in the record: a run that was
stopped goes on where it was, and `--compile` adds its columns to the rows that are there. On a machine with CUDA the
same is measured there, in bfloat16 under autocast.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from run import PAGE, ROOT, between


class Case(NamedTuple):
    """A network by its name in timm, the arguments to build it with, and the size of its images if not its own."""

    name: str
    arguments: dict[str, Any] | None = None
    pixels: int | None = None


CONVNEXT, VIT = Case("convnext_tiny"), Case("vit_small_patch16_224")
CASES = {
    "unireplknet_t": CONVNEXT,
    "hornet_tiny_7x7": CONVNEXT,
    "hornet_tiny_gf": CONVNEXT,
    "sgconvnext_tiny": CONVNEXT,
    "transnext_tiny": CONVNEXT,
    "uniformer_small": CONVNEXT,
    "convnext_iso_small": VIT,
    "patchconvnet_s60": VIT,
    "cvt_13": VIT,
    "t2t_vit_14": VIT,
    "t2t_vit_t_14": VIT,
    "orchid_vit_small_patch16_224": VIT,
    "convfirstnet": Case("resnet18"),
    "edgevit_s": Case("poolformer_s12"),
    "affnet_b": Case("mobilevit_s"),
    "tvconv_mobilenetv2_x1_0": Case("mobilenetv2_100", pixels=192),
    "ninformer_cifar": Case("mixer_s16_224", {"img_size": 32, "patch_size": 4, "embed_dim": 256, "num_blocks": 5}, 32),
    "vit_hybrid_foveal": Case("vit_tiny_patch16_224"),
}
"""TVConv's first convolution keeps all pixels: at 96 its maps have the sizes of MobileNetV2's at 192."""

VIT_SMALL = 22_050_664
ROUNDS = 3
BATCHES = {"cpu": 4, "cuda": 128}


def cases() -> dict[str, Case]:
    """CASES, and of every other file that registers variants the one that is nearest to ViT-S in size."""
    import timm
    import torch
    from timm.models import model_entrypoint

    import foveal.architectures

    found = dict(CASES)
    for file in sorted(Path(str(foveal.architectures.__file__)).parent.glob("[!_]*.py")):
        names = [
            name
            for name in timm.list_models(module=file.stem)
            if model_entrypoint(name).__module__ == f"foveal.architectures.{file.stem}"
        ]
        if not names or set(names) & set(found):
            continue
        sizes: dict[str, int] = {}
        for name in names:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        nearest = min(sizes, key=lambda name: abs(sizes[name] - VIT_SMALL))
        with torch.device("meta"):
            strides = {info["reduction"] for info in timm.create_model(nearest).feature_info}
        found[nearest] = CONVNEXT if len(strides) > 1 else VIT
    return found


class Net:
    """A network with random weights, and images for it."""

    def __init__(self, case: Case, device: str) -> None:
        import timm
        import torch

        import foveal.architectures  # noqa: F401

        torch.manual_seed(0)
        self.device = device
        self.model: Any = timm.create_model(case.name, **(case.arguments or {})).to(device)
        size = case.pixels or self.model.default_cfg["input_size"][-1]
        self.images = torch.randn(BATCHES[device], 3, size, size, device=device)
        self.labels = torch.arange(len(self.images), device=device) % self.model.num_classes
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.last = False

    def to(self, channels_last: bool) -> None:
        import torch

        self.last = channels_last
        memory: Any = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=memory)
        self.images = self.images.contiguous(memory_format=memory)

    def precision(self) -> Any:
        import torch

        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def forward(self) -> None:
        import torch

        self.model.eval()
        with torch.inference_mode(), self.precision():
            self.model(self.images)

    def step(self) -> None:
        import torch.nn.functional as F

        self.model.train()
        self.optimizer.zero_grad()
        with self.precision():
            loss = F.cross_entropy(self.model(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()

    def settle(self) -> None:
        """Choose the memory format in which a forward pass is faster."""
        seconds: dict[bool, float] = {}
        for last in (False, True):
            self.to(last)
            self.forward()
            seconds[last] = min(in_turns({"": self.forward}, self.device, 2)[""])
        self.to(seconds[True] < seconds[False])


def in_turns(runs: dict[str, Callable[[], None]], device: str, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every round; all have run before."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def peak(run: Callable[[], None], device: str) -> float:
    """MiB that a call holds at most: of the process, or of CUDA's allocator."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    run()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def tell(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def measure_alone(which: Case, device: str) -> Net:
    """Memory format, and peak memory of a forward pass and of a training step, less what was held before."""
    import torch

    import foveal.architectures  # noqa: F401

    torch.nn.Conv2d(3, 3, 1)(torch.randn(1, 3, 8, 8))
    before = peak(lambda: None, device)
    net = Net(which, device)
    net.settle()
    tell(last=net.last, batch=len(net.images), size=net.images.shape[-1])
    tell(forward_mib=peak(net.forward, device) - before)
    tell(step_mib=peak(net.step, device) - before)
    return net


def measure_row(which: Case, rival: Case, last: bool, device: str) -> None:
    """Images a second of both, and times over the neighbour; of the re-parameterised form where there is one."""
    from timm.utils import reparameterize_model

    nets = {"own": measure_alone(which, device), "rival": Net(rival, device)}
    nets["rival"].to(last)
    nets["rival"].forward()
    tell(forward=rates(in_turns({key: net.forward for key, net in nets.items()}, device), nets))
    nets["rival"].step()
    tell(step=rates(in_turns({key: net.step for key, net in nets.items()}, device), nets))
    own = nets["own"]
    merged = copy.copy(own)
    merged.model = reparameterize_model(own.model.eval())
    if [type(each) for each in merged.model.modules()] == [type(each) for each in own.model.modules()]:
        return
    merged.forward()
    nets = {"own": merged, "rival": own}
    tell(merged=rates(in_turns({key: net.forward for key, net in nets.items()}, device), nets)["ratio"])


def rates(times: dict[str, list[float]], nets: dict[str, Net]) -> dict[str, float]:
    """Images a second, and the median over the rounds of how many times the other's that is."""
    ratios = [b / a for a, b in zip(times["own"], times["rival"], strict=True)]
    return {"rate": len(nets["own"].images) / statistics.median(times["own"]), "ratio": statistics.median(ratios)}


def measure_compiled(which: Case, last: bool, device: str) -> None:
    """How many times as fast as eager the compiled network is, forward and in training, and seconds to compile."""
    import torch

    nets = {"own": Net(which, device), "rival": Net(which, device)}
    nets["own"].model = torch.compile(nets["own"].model)
    for net in nets.values():
        net.to(last)
    for what in ("forward", "step"):
        start = time.perf_counter()
        getattr(nets["own"], what)()
        seconds = time.perf_counter() - start
        getattr(nets["rival"], what)()
        times = in_turns({key: getattr(net, what) for key, net in nets.items()}, device)
        tell(**{f"compiled_{what}": {"ratio": rates(times, nets)["ratio"], "seconds": seconds}})


def busy() -> float:
    """Seconds of processor time that the whole machine has worked since it started."""
    user, nice, system, _idle, _wait, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def child(what: str, *arguments: Any, limit: float) -> dict[str, Any]:
    """What a fresh process told, why it ended early if it did, and the share of the machine that others took."""
    start, others, own = time.perf_counter(), busy(), os.times()
    command = [sys.executable, __file__, "--child", json.dumps([what, *arguments])]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        output, reason = done.stdout, ""
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:120]
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout.decode() if isinstance(stopped.stdout, bytes) else stopped.stdout or ""
        reason = f"over {limit:.0f} s"
    found: dict[str, Any] = {}
    for line in output.splitlines():
        with suppress(ValueError):
            found.update(json.loads(line))
    seconds = time.perf_counter() - start
    now = os.times()
    spent = now.children_user - own.children_user + now.children_system - own.children_system
    found["others"] = max(0.0, busy() - others - spent) / (seconds * (os.cpu_count() or 1))
    return {**found, "stopped": reason} if reason else found


def measure(which: Case, rival: Case, device: str, limit: float, rivals: dict[str, Any]) -> dict[str, Any]:
    """One row of the first table; `rivals` keeps what the neighbours hold."""
    if "step_mib" not in rivals.get(rival.name, {}):
        rivals[rival.name] = child("alone", rival, device, limit=limit)
    beside = rivals[rival.name]
    row = child("row", which, rival, beside.get("last", False), device, limit=limit)
    for what in ("forward_mib", "step_mib"):
        with suppress(KeyError):
            row[f"{what}_ratio"] = row[what] / beside[what]
    return row


def cell(row: dict[str, Any], what: str) -> str:
    if what not in row:
        return row.get("stopped", "")
    return f"{row[what]['rate']:.1f} (x {row[what]['ratio']:.2f})"


def tables(record: dict[str, Any], device: str, order: dict[str, Case]) -> list[str]:
    from foveal.evaluate.architectures import architecture_cost

    names = [name for name in order if name in record[device]]
    lines = [
        "| backbone | pixels | M parameters | G MACs | beside | images/s, forward | merged | images/s, training "
        "| MiB, forward | MiB, training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        row, cost = record[device][name], architecture_cost(name)
        memory = [
            f"{row[what]:,.0f} (x {row[f'{what}_ratio']:.2f})" if f"{what}_ratio" in row else ""
            for what in ("forward_mib", "step_mib")
        ]
        form = " †" if row.get("last") else ""
        lines.append(
            f"| {name}{form} | {row.get('size', '')} | {(cost['parameters'] or 0) / 1e6:.1f} | "
            f"{(cost['macs'] or 0) / 1e9:.2f} | {order[name].name} | {cell(row, 'forward')} | "
            + (f"x {row['merged']:.2f}" if "merged" in row else "")
            + f" | {cell(row, 'step')} | {' | '.join(memory)} |"
        )
    compiled = [name for name in names if "compiled" in record[device][name]]
    if compiled:
        lines += ["", "| backbone, compiled | forward over eager | training over eager |", "|---|---|---|"]
    for name in compiled:
        row = record[device][name]["compiled"]
        cells = [
            f"x {row[f'compiled_{what}']['ratio']:.2f}, after {row[f'compiled_{what}']['seconds']:.0f} s"
            if f"compiled_{what}" in row
            else f"none: {row.get('stopped', '')}"
            for what in ("forward", "step")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shares = [record[device][name]["others"] for name in names]
    return [
        *lines,
        "",
        f"({where(device)}; batches of {BATCHES[device]}; other processes took {statistics.median(shares):.0%} of the "
        f"machine in the median row, {max(shares):.0%} in the worst; {time.strftime('%Y-%m-%d')})",
    ]


def where(device: str) -> str:
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16"
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{threads}, {platform.machine()}, torch {torch.__version__}, float32"


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="shell patterns on variants, separated by commas")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, forward and training")
    parser.add_argument("--limit", type=float, default=180, help="seconds that one process may take")
    parser.add_argument(
        "--record", type=Path, default=ROOT / "runs" / "architectures.json", help="JSON file of results"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        what, *arguments = json.loads(given.child)
        calls: dict[str, Any] = {"alone": measure_alone, "row": measure_row, "compiled": measure_compiled}
        calls[what](*(Case(*each) if isinstance(each, list) else each for each in arguments))
        return
    record: dict[str, Any] = json.loads(given.record.read_text()) if given.record.is_file() else {}
    order = cases()
    chosen = [name for name in order if any(fnmatch.fnmatch(name, each) for each in given.only.split(","))]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows, rivals = record.setdefault(device, {}), record.setdefault(f"{device} rivals", {})
        for name in chosen:
            if "step" not in rows.get(name, {}):
                rows[name] = measure(Case(name), order[name], device, given.limit, rivals)
            if given.compile and "compiled" not in rows[name]:
                last = rows[name].get("last", False)
                rows[name]["compiled"] = child("compiled", Case(name), last, device, limit=given.limit)
            print(name, json.dumps(rows[name]), flush=True)
            given.record.parent.mkdir(parents=True, exist_ok=True)
            given.record.write_text(json.dumps(record, indent=1), encoding="utf-8")
            devices = [each for each in ("cpu", "cuda") if record.get(each)]
            lines = [line for each in devices for line in [*tables(record, each, order), ""]]
            page = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(between(page, "architectures", "\n".join(lines).rstrip()), encoding="utf-8")


if __name__ == "__main__":
    main()
