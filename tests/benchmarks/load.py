"""Loading a Llama from a directory against transformers: seconds and memory, side by side in one run.

``from_pretrained`` also reads a tiny tower and makes the new layers, which transformers does not have; that
is measured alone (``fuse``) and taken off. ``load_pretrained`` fills a decoder on the meta device.

Every call is measured in a process of its own, in which a tiny Llama was loaded the same way before, so
that imports are done. The file cache is warm for all. Memory is what the process allocated during the
call (RssAnon, Linux only, read every 2 ms from outside) over what it had before; pages of the files that
both map do not count. Part of the time is the same for any size (modules are built twice, rotary tables
computed), so that small models mean little.

Run: python tests/benchmarks/load.py [--folder DIR] [--rounds 5] [--width 1536 --layers 12 --vocab 32000]
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

FUSED, META, TRANSFORMERS = "from_pretrained", "load_pretrained", "transformers"
FUSE, REST = "  fuse alone", "  the rest"
DTYPE = torch.bfloat16
MOST_TIME, MOST_MEMORY = 1.1, 1.15
HEAD_DIM = 64
LAYOUTS = ("shards", "one file")
IMPORTS = [
    "torchfuse.checkpoint.load",
    "torchfuse.encoders.clip",
    "torchfuse.models.decoders.llama",
    "transformers.models.llama.modeling_llama",
]


class Run(NamedTuple):
    seconds: float
    worked: float  # seconds of CPU, all threads together
    peak: int  # bytes allocated at most
    size: int  # bytes of the model
    checksum: float  # sum of the embedding


def save(options, folder):
    """Write the checkpoints that are not there yet: sharded, in one file, tiny, and a CLIP tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    for kind in (*options.layouts, "tiny"):
        width, vocab = (HEAD_DIM, 97) if kind == "tiny" else (options.width, options.vocab)
        heads = width // HEAD_DIM
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=width * 5 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        )
        if not (folder / kind).exists():
            shard = options.shard if kind == "shards" else "100GB"
            LlamaForCausalLM(config).save_pretrained(folder / kind, max_shard_size=shard)
    if not (folder / "clip").exists():
        tower = CLIPVisionConfig(
            hidden_size=60, intermediate_size=97, num_hidden_layers=2, image_size=32, patch_size=8
        )
        CLIPVisionModel(tower).save_pretrained(folder / "clip")


def calls(options, folder, kind):
    """What loads a directory in each way; what is built before the clock starts is built here."""
    if kind == TRANSFORMERS:
        from transformers import LlamaForCausalLM

        return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=DTYPE)
    clip = folder.parent / "clip"
    if kind == FUSED:
        from torchfuse.checkpoint.load import from_pretrained

        return functools.partial(
            from_pretrained, decoder=folder, encoder=clip, arch="cross_attention", every=6, dtype=DTYPE
        )
    from torchfuse import fuse, load_pretrained
    from torchfuse.checkpoint.formats.clip import ClipVision
    from torchfuse.checkpoint.formats.llama import Llama
    from torchfuse.io.strict_json import read_json

    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    with torch.device("meta"):
        decoder = Llama.from_config(read_json(folder / "config.json")).build()
        tower = ClipVision.from_config(read_json(clip / "config.json")).build()
    torch.set_default_dtype(before)

    if kind == FUSE:
        parts = decoder.to_empty(device="cpu"), tower.to_empty(device="cpu")
        return lambda: fuse(*parts, arch="cross_attention", every=6)

    def call():
        load_pretrained(decoder, decoder=folder)
        return decoder

    return call


def allocated(pid):
    """Bytes of anonymous memory that a process holds."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def measured(pipe, options, folder, kind):
    """Load once in a process of its own, and send seconds and the size of the model."""
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    calls(options, folder.parent / "tiny", kind)()
    call = calls(options, folder, kind)
    pipe.send(None)
    pipe.recv()
    start, worked = time.perf_counter(), time.process_time()
    model = call()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    pipe.send((seconds, worked, allocated(os.getpid()), sum(tensor.nbytes for tensor in tensors)))
    table = next(p for p in tensors if p.shape == (options.vocab, options.width))
    assert table.dtype == DTYPE
    pipe.send(table.double().sum().item())


def measure(options, folder, kind):
    """One call in a fresh process."""
    context = multiprocessing.get_context("forkserver")  # each a fresh copy of what only imported
    context.set_forkserver_preload(IMPORTS)
    parent, child = context.Pipe()
    process = context.Process(target=measured, args=(child, options, folder, kind))
    process.start()
    child.close()
    parent.recv()
    before = peak = allocated(process.pid)
    parent.send(None)
    while not parent.poll(0.002):
        peak = max(peak, allocated(process.pid))
    seconds, worked, after, size = parent.recv()
    checksum = parent.recv()
    process.join()
    return Run(seconds, worked, max(peak, after) - before, size, checksum)


def warm(folder):
    """Read every file once, so that no call has to fetch from the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def spread(values, digits):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f} .. {high:.{digits}f}]"


def compare(options, folder):
    """Print how one directory is loaded in every way; ratios of time and of memory by way."""
    kinds = (FUSED, FUSE, META, TRANSFORMERS)
    found = {kind: [] for kind in kinds}
    for turn in tqdm(range(options.rounds), desc=folder.name, disable=None, leave=False):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            found[kind].append(measure(options, folder, kind))
    # Only the new layers; the embedding is never loaded.
    assert len({once.checksum for kind in (FUSED, META, TRANSFORMERS) for once in found[kind]}) == 1
    seconds = {kind: [once.seconds for once in runs] for kind, runs in found.items()}
    seconds[REST] = [whole - fuse for whole, fuse in zip(seconds[FUSED], seconds[FUSE], strict=True)]
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    print(f"{folder.name}: {len(files)} of together {sum(files) / 1e6:,.1f} MB")
    head = ("seconds", "seconds of CPU", "model, MB", "peak / model", "time / transformers'")
    print(f"{'':<17} {head[0]:<23} {head[1]:<15} {head[2]:<10} {head[3]:<23} {head[4]}")
    ratios = {}
    for kind in (FUSED, FUSE, REST, META, TRANSFORMERS):
        line = f"{kind:<17} {spread(seconds[kind], 3):<23} "
        if kind != REST:
            line += f"{statistics.median(once.worked for once in found[kind]):<15.2f} "
            line += f"{found[kind][0].size / 1e6:<10,.1f} "
        if kind in (FUSED, META, TRANSFORMERS):
            line += f"{spread([once.peak / once.size for once in found[kind]], 3):<23} "
        if kind in (REST, META):
            times = [a / b for a, b in zip(seconds[kind], seconds[TRANSFORMERS], strict=True)]
            memory = statistics.median(o.peak / o.size for o in found[META if kind == META else FUSED])
            ratios[folder.name, kind] = statistics.median(times), memory
            line = f"{line:<92} {spread(times, 2)}"
        print(line)
    for kind in (REST, META):
        time_ratio, memory = ratios[folder.name, kind]
        print(
            f"{kind.strip()}: time {verdict(time_ratio, MOST_TIME)}, peak {verdict(memory, MOST_MEMORY)}"
        )
    print()
    return ratios


def verdict(ratio, most):
    return f"{ratio:.2f}, {'within' if ratio <= most else 'ABOVE'} {most}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where checkpoints are or shall be kept")
    parser.add_argument("--width", type=int, default=1536, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=12, help="6 or more")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--shard", default="300MB")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    import safetensors
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        save(options, folder)
        print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}")
        print(f"transformers {transformers.__version__}, safetensors {safetensors.__version__}")
        sizes = f"{options.layers} layers, width {options.width}, vocabulary {options.vocab}"
        print(f"a random Llama of {sizes}: fp32 in the files, loaded as bf16")
        print("median of", options.rounds, "fresh processes each, in turns, and [least .. most]\n")
        ratios = {}
        for layout in options.layouts:
            warm(folder / layout)
            ratios |= compare(options, folder / layout)
    return ratios


if __name__ == "__main__":
    main()
