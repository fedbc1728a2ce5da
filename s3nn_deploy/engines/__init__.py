"""The emulator's engines: each fills in the spikes of a layer; layers and the counter are shared.

A module has `prepare(layer) -> Step | None`; None where it cannot express the layer, which `blas` then runs. Its `add`, if it
has one, counts as `counting.add` does. Between layers, signals are unsigned integers [N, H, W, C], and a flat population is 1 x 1 x C.
"""
