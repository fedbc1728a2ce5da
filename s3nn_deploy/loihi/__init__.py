"""From an integer network to Loihi: `mapping` (what runs), `fit` (on which cores), `bill` (what it costs), `delivery`."""
