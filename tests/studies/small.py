"""Settings of a run that takes a moment: UNETR of 3 blocks, 2 steps."""

SMALL = [
    "network=unetr",
    "network_options={depth: 3, width: 16, heads: 2, patch: 8, feature_size: 4}",
    "loop.steps=2",
    "loop.log_every=1",
    "loop.workers=0",
    "loop.device=cpu",
    "loop.amp=off",
    "optim.warmup=0",
    "optim.lr=1e-2",
    "sampling.batch_size=1",
    "validation.overlap=0",
]
