"""The response to a request, whole: its start, its end, and the items of its output."""

from collections.abc import Sequence

from msgspec.structs import replace

from server.api.choice import Finish, Scored
from server.api.door import new_id, now
from server.api.generate import Tally
from server.api.logprobs import chat_logprobs
from server.api.schema.answers import TokenLogprob
from server.api.schema.base import defined
from server.api.schema.response_answers import (
    CallOutput,
    Incomplete,
    InputDetails,
    MessageOutput,
    ModelResponse,
    Output,
    OutputDetails,
    OutputText,
    ReasoningOutput,
    ReasoningText,
    ResponseUsage,
)
from server.api.schema.responses import ResponsesRequest
from server.api.whole import Answer, Whole
from server.text.vocabulary import Vocabulary


def begun(body: ResponsesRequest, id: str) -> ModelResponse:
    """Without output yet."""
    format = None if body.text is None else body.text.format
    choice = body.tool_choice
    return ModelResponse(
        id=id,
        created_at=now(),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        store=body.store,
        temperature=body.temperature,
        text={"format": {"type": "text"} if format is None else defined(format)},
        tool_choice=defined(choice),
        tools=defined(body.tools),
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
    )


def ended(
    response: ModelResponse, output: list[Output], finish: Finish | None, tally: Tally
) -> ModelResponse:
    cut = finish == "length"
    return replace(
        response,
        status="incomplete" if cut else "completed",
        completed_at=None if cut else now(),
        incomplete_details=Incomplete(reason="max_output_tokens") if cut else None,
        output=output,
        usage=ResponseUsage(
            input_tokens=tally.prompt,
            input_tokens_details=InputDetails(cached_tokens=tally.cached),
            output_tokens=tally.completion,
            output_tokens_details=OutputDetails(reasoning_tokens=tally.reasoning),
            total_tokens=tally.prompt + tally.completion,
        ),
    )


def whole_response(response: ModelResponse, whole: Whole) -> ModelResponse:
    (answer,) = whole.answers
    output = _output(answer, whole.begun.vocabulary)
    return ended(response, output, answer.finish, whole.tally)


def _output(answer: Answer, vocabulary: Vocabulary) -> list[Output]:
    """Only its last item may be cut."""
    output: list[Output] = []
    if answer.reasoning:
        content = [ReasoningText(text=answer.reasoning)]
        output.append(ReasoningOutput(id=new_id("rs_"), content=content, status="completed"))
    if answer.text or not answer.calls:
        part = OutputText(text=answer.text, logprobs=logprobs(answer.scored, vocabulary))
        output.append(MessageOutput(id=new_id("msg_"), content=[part], status="completed"))
    output += [
        CallOutput(
            id=new_id("fc_"), call_id=call.id, name=call.name, arguments=call.arguments, status="completed"
        )
        for call in answer.calls
    ]
    if is_cut(output[-1], answer.finish):
        output[-1] = replace(output[-1], status="incomplete")
    return output


def is_cut(last: Output, finish: Finish | None) -> bool:
    """By the limit, or, in a call, by one of the request's stop texts."""
    return finish == "length" or (isinstance(last, CallOutput) and finish != "tool_calls")


def logprobs(scored: Sequence[Scored], vocabulary: Vocabulary) -> list[TokenLogprob]:
    return chat_logprobs(scored, vocabulary).content if scored else []
