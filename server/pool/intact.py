"""A built variant is served only where every file is what was built; else it goes into quarantine."""

import logging

from quant.errors import DamagedVariant
from quant.plan import variant_key
from quant.source import Source
from quant.store import Variant, VariantStore
from server.pool.select import find_variant, recipe_of

log = logging.getLogger(__name__)


def intact_variant(store: VariantStore, source: Source, name: str) -> Variant | None:
    """The variant of that name, hashed if it was not since the machine started; None: it is to be built."""
    variant = find_variant(store, source, name)
    if variant is None:
        _put_away_broken(store, source, name)
        return None
    try:
        return store.ensure_intact(variant.key)
    except DamagedVariant as error:
        log.error("%s; it is put into quarantine and built anew", error)
        store.quarantine(variant.key)
        return None


def _put_away_broken(store: VariantStore, source: Source, name: str) -> None:
    """What is no whole variant is not even found: its manifest cannot be read, or a size is wrong."""
    recipe = recipe_of(name)
    if recipe is not None and store.is_damaged(key := variant_key(source, recipe)):
        log.error("variant %s is not whole; it is put into quarantine and built anew", key)
        store.quarantine(key)
