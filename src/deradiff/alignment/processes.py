"""The processes of one training: waited for before the work begins, and not while one of them works for the others."""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch import distributed

from deradiff.files.waiting import Patience, WaitedTooLong, announced, bound

LONGEST = timedelta(days=2)
"""How long the others wait while the first process prepares the data, which is work and can take hours."""


def meet() -> distributed.Store | None:
    """Wait until all processes of this training have begun, where the environment says that there are several.

    Accelerate would do so for as long as for anything else, `LONGEST`. What is returned is where they meet: it has to
    be kept until Accelerate has made their group. Raises `WaitedTooLong`.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if distributed.is_initialized() or not all(os.environ.get(name) for name in names):
        return None
    count = int(os.environ["WORLD_SIZE"])
    if count < 2:
        return None
    what = f"all {count} processes of this training to begin"
    where = f"they meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, this is number {os.environ['RANK']}"
    most = timedelta(seconds=min(bound(), LONGEST.total_seconds()))
    try:
        with announced(what, lambda: where):
            store, _, _ = next(iter(distributed.rendezvous("env://", timeout=most)))
            store.add("deradiff/begun", 1)
    except distributed.DistError as error:
        raise WaitedTooLong(f"gave up waiting for {what}: {where} ({' '.join(str(error).split())[:200]})") from None
    patience = Patience(what, lambda: f"{store.add('deradiff/begun', 0)} are there; {where}")
    while store.add("deradiff/begun", 0) < count:
        patience.check()
        time.sleep(0.05)
    return store
