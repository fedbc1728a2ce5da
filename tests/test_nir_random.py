"""A hundred random networks through every profile of NIR files: each file is the network again."""

import nets
import numpy as np
import pytest

from s3nn_deploy import formats
from s3nn_deploy.backends import reference
from s3nn_deploy.formats import nir as nir_format


@pytest.mark.parametrize("first", range(3000, 3100, 10))
def test_every_profile_holds_random_networks(first, tmp_path):
    for seed in range(first, first + 10):
        net = nets.random_net(seed, max_side=7)
        x, seen = nets.samples(net, 6), set()
        want = reference.run(net, x)
        for profile in nir_format.PROFILES:
            options = {"profile": profile, "merge_skips": bool(seed % 2)}
            back = formats.read(nir_format.write(net, tmp_path / "net.nir", **options))
            assert back == nir_format.lower(net, **options)
            if back not in seen:
                got = reference.run(back, x.reshape(-1, *back.input.shape))
                assert np.array_equal(got.readout, want.readout)
                for name, spikes in want.spikes.items():
                    flat = spikes.reshape(len(x), -1)
                    assert np.array_equal(got.spikes[name].reshape(len(x), -1)[:, : flat.shape[1]], flat), name
            seen.add(back)
