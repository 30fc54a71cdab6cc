#!/usr/bin/env bash
# aqlm 1.1.7 (with Numba 0.68.1): the CPU product of a layer with codebooks of 256 entries is wrong where Numba has
# several threads. They take groups of inputs in parallel, and all of them add into one vector of outputs, so
# additions are lost: now and then, and differently each time. One would expect the same numbers for any number of
# threads, and that `torch.set_num_threads(1)` makes it safe; it does not reach Numba's threads. NUMBA_NUM_THREADS=1
# before the start does.
#
# Here: the card of a packed model sets NUMBA_NUM_THREADS=1; our own kernels let a thread own the outputs that it adds
# to.
#
# Relative error of 200 products of random numbers, the largest:
#   NUMBA_NUM_THREADS=4, torch.set_num_threads(1): 1.5e-01
#   NUMBA_NUM_THREADS=1: 4.7e-07
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile "aqlm[cpu]==1.1.7" numba==0.68.1 \
    torch==2.13.0 numpy==2.4.6 transformers==5.23.0

cat > product.py <<'PYTHON'
import torch
from aqlm import QuantizedLinear

torch.set_num_threads(1)
torch.manual_seed(0)
options = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8}
layer = QuantizedLinear(2048, 512, bias=False, dtype=torch.float32, **options)
layer.codes.data = torch.randint(-128, 128, layer.codes.shape, dtype=torch.int8)
layer.codebooks.data = torch.randn_like(layer.codebooks)
layer.scales.data = torch.ones_like(layer.scales)
entries = [layer.codebooks[m, layer.codes[..., m].long() % 256, 0] for m in range(2)]  # [512, 256, 8] each
weight = sum(entries).flatten(1).double()


def error(x):
    wanted = x.double() @ weight.T
    return float((layer(x) - wanted).norm() / wanted.norm())


with torch.no_grad():
    print(f"{max(error(torch.randn(1, 2048)) for _ in range(200)):.1e}")
PYTHON

several=$(NUMBA_NUM_THREADS=4 venv/bin/python product.py)
one=$(NUMBA_NUM_THREADS=1 venv/bin/python product.py)
echo "NUMBA_NUM_THREADS=4, torch.set_num_threads(1): $several"
echo "NUMBA_NUM_THREADS=1: $one"
venv/bin/python -c "assert $one < 1e-5 and $several > 1e-3, 'not what was found'"
