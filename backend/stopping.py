"""Why a request ends behind its newest token."""

from footplate.backend.request import Request
from footplate.protocol.messages import FinishReason


def reason_to_stop(request: Request, token_id: int) -> FinishReason | None:
    """The reason, if there is one; `token_id` has just been appended to the output.

    A stop token comes first, also at the last allowed position, and then the length. Nothing but
    the length ends an output that is shorter than its `min_tokens`.
    """
    params, num_output_tokens = request.params, request.num_output_tokens
    is_repeating = request.repetition is not None and request.repetition.advance(token_id)
    if token_id in params.stop_token_ids and num_output_tokens > params.min_tokens:
        return FinishReason.STOP
    if len(request.token_ids) >= request.max_num_tokens:
        return FinishReason.LENGTH
    if is_repeating and num_output_tokens >= params.min_tokens:
        return FinishReason.REPETITION
    return None
