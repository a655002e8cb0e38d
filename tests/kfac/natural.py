"""K-FAC with its published step, of which most of these tests are."""

from typing import Any

import secondorder.kfac


class KFAC(secondorder.kfac.KFAC):
    """With step_rule="natural" unless said otherwise."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"step_rule": "natural"} | options))
