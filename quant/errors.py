"""Why a source cannot be read, or a variant made or trusted. Each class is one code."""


class QuantError(Exception):
    """Root of everything `quant` raises on purpose. The message is one line fit for a user."""

    code = "quant_failed"


class BadRecipe(QuantError):
    """The recipe is unknown or cannot be applied to this source."""

    code = "bad_recipe"


class BadSource(QuantError):
    """The checkpoint is missing, truncated, malformed or of a kind never opened (pickles, auto_map)."""

    code = "bad_source"


class DownloadBroken(BadSource):
    """A hub that answered before does not go on: asking again may help."""

    code = "download_broken"


class UnsupportedArchitecture(BadSource):
    """The architecture has no row in the family table."""

    code = "unsupported_architecture"


class TokenizerMismatch(BadSource):
    """llama.cpp and `tokenizers` read the probe text differently; the message holds both token lists."""

    code = "tokenizer_mismatch"


class DamagedVariant(QuantError):
    """A published file is not what its manifest says."""

    code = "damaged_variant"


class UnknownVariant(QuantError):
    """No published variant has this key."""

    code = "unknown_variant"


class VariantInUse(QuantError):
    """A variant that an engine holds open cannot be deleted."""

    code = "variant_in_use"


class DiskFull(QuantError):
    """The cache's disk or its size limit has no room."""

    code = "disk_full"


class BuildFailed(QuantError):
    """Converting or quantizing went wrong for a reason that is not the user's."""

    code = "build_failed"


class Cancelled(QuantError):
    """Somebody asked the build to stop."""

    code = "cancelled"
