"""Loading a Llama from a directory against transformers: seconds and memory, side by side in one run.

Every call is measured in a process of its own, in which a tiny Llama was loaded the same way before, so
that imports are done. The file cache is warm for all. Memory is what the process allocated during the
call (RssAnon, Linux only, read every 2 ms from outside) over what it had before; pages of the files that
both map do not count.

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

import torch
from tqdm import tqdm

FUSED, META, THEIRS = "from_pretrained, fused", "load_pretrained, from meta", "transformers"
DTYPE = torch.bfloat16
MOST_TIME, MOST_MEMORY = 1.1, 1.15
HEAD_DIM = 64
IMPORTS = ["torchtune", "torchfuse.checkpoint.building", "transformers.models.llama.modeling_llama"]


def save(options, folder):
    """Write the checkpoints that are not there yet: sharded, in one file, tiny, and a CLIP tower."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    for kind, width, vocab, shard in (
        ("shards", options.width, options.vocab, options.shard),
        ("one file", options.width, options.vocab, "100GB"),
        ("tiny", HEAD_DIM, 97, "100GB"),
    ):
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
            LlamaForCausalLM(config).save_pretrained(folder / kind, max_shard_size=shard)
    if not (folder / "clip").exists():
        tower = CLIPVisionConfig(
            hidden_size=60, intermediate_size=97, num_hidden_layers=2, image_size=32, patch_size=8
        )
        CLIPVisionModel(tower).save_pretrained(folder / "clip")


def calls(options, folder, kind):
    """What loads a directory in each way; what is built before the clock starts is built here."""
    if kind == THEIRS:
        from transformers import LlamaForCausalLM

        return lambda: LlamaForCausalLM.from_pretrained(folder, dtype=DTYPE)
    clip = folder.parent / "clip"
    if kind == FUSED:
        from torchfuse.checkpoint.building import from_pretrained

        return functools.partial(
            from_pretrained, decoder=folder, encoder=clip, arch="cross_attention", every=6, dtype=DTYPE
        )
    from torchfuse import load_pretrained
    from torchfuse.checkpoint.directory import read_json
    from torchfuse.checkpoint.llama import Llama

    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    with torch.device("meta"):
        decoder = Llama.from_config(read_json(folder / "config.json")).build()
    torch.set_default_dtype(before)

    def call():
        load_pretrained(decoder, decoder=folder)
        return decoder

    return call


def allocated(pid):
    """Bytes of anonymous memory that a process holds."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def measured(pipe, options, folder, kind):
    """In a process of its own: load once and say how long it took and how large the model is."""
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
    """One call in a fresh process: seconds, peak of memory, size of the model, sum of its embedding."""
    context = multiprocessing.get_context("forkserver")  # each a fresh copy of what only imported
    context.set_forkserver_preload(IMPORTS)
    mine, its = context.Pipe()
    process = context.Process(target=measured, args=(its, options, folder, kind))
    process.start()
    its.close()
    mine.recv()
    before = peak = allocated(process.pid)
    mine.send(None)
    while not mine.poll(0.002):
        peak = max(peak, allocated(process.pid))
    seconds, worked, after, size = mine.recv()
    checksum = mine.recv()
    process.join()
    return seconds, worked, max(peak, after) - before, size, checksum


def warm(folder):
    """Read every file once, so that no call has to fetch from the disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def spread(values, digits):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:6.{digits}f}  [{low:.{digits}f} .. {high:.{digits}f}]"


def compare(options, folder):
    """Print how one directory is loaded in every way; the ratios of ours and theirs."""
    kinds = (FUSED, META, THEIRS)
    found = {kind: [] for kind in kinds}
    for turn in tqdm(range(options.rounds), desc=folder.name, disable=None, leave=False):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            found[kind].append(measure(options, folder, kind))
    assert len({once[-1] for runs in found.values() for once in runs}) == 1
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    print(f"{folder.name}: {len(files)} of together {sum(files) / 1e6:,.1f} MB")
    ratios = {}
    for kind, runs in found.items():
        seconds, worked, peaks, sizes, _ = zip(*runs, strict=True)
        memory = [peak / size for peak, size in zip(peaks, sizes, strict=True)]
        line = f"  {kind:<26} {spread(seconds, 3)} s   {statistics.median(worked):.2f} s CPU   model {sizes[0] / 1e6:,.1f} MB, "
        line += f"peak / model {spread(memory, 3)}"
        if kind != THEIRS:
            times = [ours[0] / theirs[0] for ours, theirs in zip(runs, found[THEIRS], strict=True)]
            line += f"   time / transformers' {spread(times, 2)}"
            ratios[folder.name, kind] = statistics.median(times), statistics.median(memory)
        print(line)
    print()
    return ratios


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where checkpoints are or shall be kept")
    parser.add_argument("--width", type=int, default=1536, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=12, help="6 or more")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--shard", default="300MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        save(options, folder)
        import safetensors
        import transformers

        print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}")
        print(f"transformers {transformers.__version__}, safetensors {safetensors.__version__}")
        print(f"a random Llama: {options.layers} layers, width {options.width}, vocabulary")
        print("median of", options.rounds, "fresh processes each, in turns, and [least .. most]\n")
        ratios = {}
        for kind in ("shards", "one file"):
            warm(folder / kind)
            ratios |= compare(options, folder / kind)
    return ratios


if __name__ == "__main__":
    main()
