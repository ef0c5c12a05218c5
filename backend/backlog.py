"""How much has been taken in and has not had its first step."""

from footplate.backend.request import Request


class Backlog:
    """Counts requests and the tokens of their prompts; siblings have one prompt.

    Attributes:
        num_requests: without a first step.
        num_tokens: of their prompts.
    """

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_tokens = 0

    def enter(self, requests: list[Request]) -> None:
        """A request, or all the siblings of one prompt, has been taken in."""
        self.num_requests += len(requests)
        num_tokens = requests[0].num_prompt_tokens
        self.num_tokens += num_tokens
        if (account := requests[0].account) is not None:
            account.num_queued_tokens += num_tokens

    def leave(self, request: Request) -> None:
        """A request has its first step, or has ended without one."""
        self.num_requests -= 1
        siblings = request.siblings
        if siblings is not None:
            siblings.num_queued -= 1
            if siblings.num_queued:
                return
        self.num_tokens -= request.num_prompt_tokens
        if (account := request.account) is not None:
            account.num_queued_tokens -= request.num_prompt_tokens
