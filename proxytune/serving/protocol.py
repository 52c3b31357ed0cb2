"""What may be asked: OpenAI's completions and chat, with `alpha` and `steering` beside their fields.

A field that would change the answer and is not done here is refused unless it asks for nothing, so that no answer is
other than what was asked for.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from proxytune.errors import did_you_mean
from proxytune.models.prompts import Turns
from proxytune.settings.sections import Noise, Penalty, Share, Temperature, Whole

MOST_ALPHA = 1000.0  # beyond it scores overflow
MOST_LOGPROBS = 20
MOST_STOPS, MOST_STOP = 16, 200

FORMS = {  # of fields that have several, where pydantic tells of one that may not be the one that was meant
    "alpha": f"a number from -{MOST_ALPHA:g} to {MOST_ALPHA:g}, or a list of them, one for each expert",
    "steering": 'like {"code@best": 0.7} or [{"expert": "code@best", "alpha": 0.7}], '
    f"each alpha from -{MOST_ALPHA:g} to {MOST_ALPHA:g}",
    "prompt": "a text, a list of token ids, or a list of texts or of lists of token ids",
    "stop": f"a text of 1 to {MOST_STOP} characters, or at most {MOST_STOPS} such texts",
}


Alpha = Annotated[FiniteFloat, Field(ge=-MOST_ALPHA, le=MOST_ALPHA)]
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP)]
T = TypeVar("T")
Some = Annotated[list[T], Field(min_length=1)]
B = TypeVar("B", bound=BaseModel)


class Refused(Exception):
    """An answer that is an error, in OpenAI's terms."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Pull(Body):
    """One of the experts that are served, and how hard it steers."""

    expert: str
    alpha: Alpha


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Generation(Body):
    """What completions and chat share. None leaves it to the server's `decode` settings.

    alpha: one number for the first expert, or one for each; steering: the same by name, those not named at 0.
    seed: None draws one. The i-th choice has the seed seed + i.
    """

    model: str
    alpha: Alpha | list[Alpha] | None = None
    steering: list[Pull] | dict[str, Alpha] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Whole | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Penalty | None = None
    seed: Noise | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Whole | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # taken and of no effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    # taken where they ask for nothing
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _one_way(self):
        if self.alpha is not None and self.steering is not None:
            raise ValueError("give alpha or steering, not both")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self


class Completion(Generation):
    """prompt: a text, several, or ids, or several lists of ids."""

    prompt: str | Some[str] | Some[int] | Some[Some[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool = False
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        found: Any = self.prompt if many else [self.prompt]
        return found

    @property
    def told(self) -> int | None:
        return self.logprobs


class Message(BaseModel):
    """Other fields, such as a name, are let be."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _text_parts(cls, content: Any) -> Any:
        """Parts of text are joined; images and sounds are refused."""
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            return "".join(str(part.get("text", "")) for part in content)
        return content


class TextFormat(Body):
    type: Literal["text"]


class Chat(Generation):
    messages: Some[Message]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool = False
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _asked_for(self):
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    @property
    def prompts(self) -> list[Turns]:
        return [[{"role": message.role, "content": message.content} for message in self.messages]]

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Tokenize(Body):
    """The base's ids of a prompt, or of a chat as the base reads it."""

    model: str | None = None
    prompt: str | None = None
    messages: Some[Message] | None = None

    @property
    def text(self) -> Turns:
        if self.messages is not None:
            return [{"role": message.role, "content": message.content} for message in self.messages]
        return self.prompt or ""

    @model_validator(mode="after")
    def _one_of_them(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


def parse(kind: type[B], data: bytes) -> B:
    """A body from its bytes. Raises Refused (400) naming the first field that is wrong."""
    try:
        values = json.loads(data)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is JSON and no text
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON text") from None
    if not isinstance(values, dict):
        raise Refused(400, "the body is not a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            hint = did_you_mean(str(param), kind.model_fields)
            raise Refused(400, f"{param} is not known here; {hint}", param) from None
        if param in FORMS:
            raise Refused(400, f"{param} must be {FORMS[param]}", param) from None
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{where}: {told}" if where else told, param) from None
