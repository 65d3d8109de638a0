"""Time, memory and results of the training step of one implementation."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

from torchfuse.data import padded_collate_images

if __package__:
    from .bandwidth import synchronize
    from .resident import reset_peak, resident
    from .train_models import IMPLEMENTATIONS, make_batch, samples, to_device
else:
    from bandwidth import synchronize
    from resident import reset_peak, resident
    from train_models import IMPLEMENTATIONS, make_batch, samples, to_device


class Step:
    """The training step of one implementation."""

    def __init__(self, options, name, arch, folder):
        import transformers

        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options.threads)
        self.options, self.arch, self.batches = options, arch, {}
        self.implementation = IMPLEMENTATIONS[name](options, arch, folder)
        self.model = self.implementation.model.train()
        parameters = dict(self.model.named_parameters())
        sources = self.implementation.source_names
        self.fusion = {
            target: (parameters[sources[target][0]], sources[target][1])
            for target in self.implementation.fusion
        }
        for parameter in parameters.values():
            parameter.requires_grad_(options.full)
        for parameter, _ in self.fusion.values():
            parameter.requires_grad_(True)

    def batch(self, kind):
        if kind not in self.batches:
            self.batches[kind], _ = make_batch(self.options, self.arch, kind)
        return self.batches[kind]

    def run(self, batch):
        self.model.zero_grad(set_to_none=True)
        loss = self.implementation.loss(batch)
        loss.backward()
        return loss.detach()

    def check(self, kind):
        """The loss, and the gradients of what is trained in every case."""
        loss = float(self.run(self.batch(kind)))
        grads = {}
        for name, (parameter, layout) in self.fusion.items():
            grad = parameter.grad if layout is None else layout.to_target(parameter.grad)
            grads[name] = grad.flatten().float().cpu().numpy()
        return loss, grads

    def seconds(self, kind):
        """Time of a step, and of the CPU's cores together."""
        batch = self.batch(kind)
        synchronize(self.options.device)
        start, worked = time.perf_counter(), time.process_time()
        self.run(batch)
        synchronize(self.options.device)
        return time.perf_counter() - start, time.process_time() - worked

    def memory(self, kind):
        """The peak of a step over what was allocated before, in bytes."""
        batch = self.batch(kind)
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        return peak_memory(self.options.device, lambda: self.run(batch))

    def flops(self, kind):
        """What the samples of a batch need one by one."""
        with FlopCounterMode(display=False) as counter:
            for sample in samples(self.options, self.arch, kind):
                self.run(to_device(padded_collate_images([sample]), self.options))
        return counter.get_total_flops()


def peak_memory(device, step):
    """The peak of a step over what was allocated before, in bytes."""
    if device == "cuda":
        synchronize("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


class Alone:
    """A step in a process of its own."""

    def __init__(self, *arguments):
        self.pipe, child = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve, args=(child, *arguments), daemon=True)
        self.process.start()
        child.close()
        self.pipe.recv()

    def __getattr__(self, method):
        def call(*arguments):
            self.pipe.send((method, arguments))
            return self.pipe.recv()

        return call

    def close(self):
        self.pipe.close()
        self.process.join()


def serve(pipe, *arguments):
    step = Step(*arguments)
    pipe.send(None)
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(step, method)(*given))
