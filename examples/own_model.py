"""Streams a model of one's own: a plain stack of PyTorch's encoder layers."""

import torch

import torch_offload

model = torch.nn.TransformerEncoder(
    torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), num_layers=8
).eval()

device = "cuda" if torch.cuda.is_available() else "cpu"
with torch_offload.offload(model, device) as handle, torch.no_grad():
    for _ in range(3):
        output = model(torch.ones(1, 16, 256, device=device))
    handle.report()
