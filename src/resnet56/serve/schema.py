"""What the API says, as types: they check, document and describe it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Base64 = Annotated[
    str, Field(json_schema_extra={"contentEncoding": "base64"}, examples=["iVBORw0KGgo..."])
]


class Pictures(BaseModel):
    """Pictures in JSON; where a client can send multipart/form-data, that is a third smaller."""

    model_config = ConfigDict(extra="forbid")

    images: list[Base64] = Field(
        min_length=1, description="Picture files (PNG, JPEG, WebP, ...), each in base64."
    )


class ClassScore(BaseModel):
    """What speaks for one class."""

    name: str = Field(description="The class.", examples=["cat"])
    probability: float = Field(
        ge=0, le=1, description="The network's confidence; over all classes it sums to 1."
    )
    map: list[list[float]] | None = Field(
        None,
        description="Class-activation map, if asked for: 8 rows of 8 numbers over the centre "
        "square of the picture, top left first. Their mean and the class's bias make the score "
        "that the probability comes from; above 0 speaks for the class, below against it.",
    )


class Prediction(BaseModel):
    """The answer for one picture."""

    classes: list[ClassScore] = Field(description="The most likely classes, likeliest first.")


class Answer(BaseModel):
    """The answer for a request."""

    network: str = Field(description="Which network answered.", examples=["resnet56"])
    predictions: list[Prediction] = Field(description="One per picture, in the order sent.")


class Health(BaseModel):
    """That the server is up, and with what."""

    status: Literal["ok"] = Field(description="There is no other.")
    network: str = Field(description="Which network answers.")
    classes: list[str] = Field(description="All classes it knows; it always answers one of them.")
    version: str = Field(description="Of the package resnet56.")


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="What is wrong and what to do, in one line.")
