"""Variables that a model's chat template does not read are named like other fields without effect."""

from fastapi import Request

from server.api.edge import trace_of
from server.api.schema.base import header_value
from server.api.schema.chat import ChatRequest
from server.text.model import TextModel


def name_unused(request: Request, body: ChatRequest, text: TextModel) -> None:
    """Puts them into X-Ignored-Params, which a stream sends with its first byte: in time, but for a ping."""
    known = text.template.variables
    if unused := [f"chat_template_kwargs.{name}" for name in body.chat_template_kwargs if name not in known]:
        trace_of(request.scope).headers["x-ignored-params"] = header_value([*body.ignored(), *unused])
