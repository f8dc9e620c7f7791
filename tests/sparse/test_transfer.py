"""Copies from the host; that they wait for nothing on a GPU is a case of bench/check_attention.py."""

from __future__ import annotations

import pytest
import torch
from cases.sparse import tensors
from torch._subclasses import FakeTensorMode

from vdit_ext.sparse import SVG1, TokenLayout, kmeans, svg1, transfer


def test_on_the_cpu_nothing_is_copied():
    rows = torch.arange(5)
    assert transfer.to_device(rows, torch.device("cpu")) is rows


def test_to_a_gpu_it_goes_through_pinned_memory(monkeypatch):
    """Without a GPU: which op is called, and what a traced graph holds of it."""
    with FakeTensorMode():
        there = transfer.to_device(torch.empty(2, 7, dtype=torch.int64), torch.device("cuda"))
    assert there.device.type == "cuda" and there.shape == (2, 7) and there.dtype == torch.int64
    done = []

    class Host(torch.Tensor):
        def pin_memory(self):
            done.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            done.append((device, non_blocking))
            return torch.zeros(1)

    transfer._upload._init_fn(torch.zeros(1).as_subclass(Host), torch.device("cuda"))
    assert done == ["pinned", (torch.device("cuda"), True)]


def test_to_a_gpu_values_arrive():
    if not torch.cuda.is_available():
        pytest.skip("cuda: no GPU on this machine")
    rows = torch.randint(1000, (64,))
    there = transfer.to_device(rows, torch.device("cuda"))
    assert there.device.type == "cuda" and torch.equal(there.cpu(), rows)


def test_host_draws_take_that_way(monkeypatch):
    seen = []

    def watched(host, device):
        seen.append(host.shape)
        return host.to(device)

    monkeypatch.setattr(kmeans, "to_device", watched)
    monkeypatch.setattr(svg1, "to_device", watched)
    (x,) = tensors(1, 2, 30, 8, count=1)
    kmeans.draw_centroids(x, 4)
    kmeans.draw_centroids(x, 4, init="kmeans++")
    assert seen == [(1, 2, 4), (4, 1, 2, 1)]
    seen.clear()
    method = SVG1(block_size=8, num_samples=6)
    q, k, _ = tensors(1, 2, 30, 8)
    method.plan(q, k, TokenLayout((2, 3, 5)), method.new_state(0, 1))
    assert seen == [(6,)]
