"""Request and response types of the API, which also define its OpenAPI description."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Base64 = Annotated[
    str, Field(json_schema_extra={"contentEncoding": "base64"}, examples=["iVBORw0KGgo..."])
]


class PredictRequest(BaseModel):
    """Images as JSON. A multipart/form-data body with the same images is about 25 % smaller."""

    model_config = ConfigDict(extra="forbid")

    images: list[Base64] = Field(
        min_length=1, description="Image files (PNG, JPEG, WebP, ...), each encoded as base64."
    )


class ClassScore(BaseModel):
    """The score of one class."""

    name: str = Field(description="Name of the class.", examples=["cat"])
    probability: float = Field(
        ge=0, le=1, description="Softmax probability. The probabilities of all classes sum to 1."
    )
    map: list[list[float]] | None = Field(
        None,
        description="Class activation map, if requested: 8 rows of 8 values that cover the center "
        "square of the image, starting at the top left. Positive values are evidence for the "
        "class, and negative values are evidence against it. The logit is the mean of the map plus "
        "the bias of the class.",
    )


class Prediction(BaseModel):
    """The prediction for one image."""

    classes: list[ClassScore] = Field(
        description="The most probable classes, in descending order of probability."
    )


class PredictResponse(BaseModel):
    """The predictions for a request."""

    model: str = Field(description="Name of the model.", examples=["resnet56"])
    predictions: list[Prediction] = Field(
        description="One prediction per image, in the order of the request."
    )


class HealthResponse(BaseModel):
    """The state of a healthy server."""

    status: Literal["ok"] = Field(description="Always `ok`.")
    model: str = Field(description="Name of the model.")
    classes: list[str] = Field(description="Names of all classes of the model.")
    version: str = Field(description="Version of the resnet56 package.")


class ErrorResponse(BaseModel):
    """The reason for a failed request."""

    detail: str = Field(description="One line that states what is wrong and how to fix it.")
