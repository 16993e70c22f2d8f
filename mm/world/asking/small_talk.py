"""Short replies to what is neither a request nor a question about a picture: greetings, thanks, help, praise.

Design choices
- A reply says what the model can do and never draws. What is understood as none of this is left to the caller.
"""

from __future__ import annotations

import re

EXAMPLES = '"draw two red cats on grass", "make them blue", "how many cats are there?"'
CAN_DO = f"I can draw a picture, change it and answer questions about it. For example: {EXAMPLES}."
HELLO = "Hello! What can I draw for you?"
UNCLEAR = f"I do not understand this. {CAN_DO}"
NO_PICTURE = "There is no picture yet. What can I draw for you?"
SAY_WHAT = f"Say what to draw, for example {EXAMPLES.split(',')[0]}."

_NAME = r"(?:mm|mm-tiny|there|you|friend|everyone|again|all|computer|bot|assistant)"
_VERY = r"(?:very|really|so|pretty|quite|absolutely|just|too)"
_PRAISE = (
    r"nice|good|great|cool|awesome|amazing|wonderful|excellent|perfect|beautiful|lovely|super|fantastic|brilliant"
    r"|neat|cute|well done"
)
_GREETING = rf"(?:hello|hi|hiya|hey|howdy|greetings|yo|good (?:morning|evening|afternoon|day|night))(?: {_NAME})*"
_REPLIES: tuple[tuple[str, str], ...] = (
    (_GREETING, HELLO),
    (
        r"(?:many |ok |okay |great |no )?(?:thanks|thank you|thx|ty|cheers|much appreciated|thank u|merci|danke)"
        r"(?: (?:a lot|so much|very much|you|again|for .*|a million|mm|that is all))*",
        "You are welcome!",
    ),
    (r"(?:good ?bye|bye|bye bye|see you(?: later| soon)?|farewell|that is all|i am done|quit|exit)", "Goodbye!"),
    (
        r"(?:never ?mind|stop|cancel|forget)(?: (?:it|that|this))?|(?:oh |no )?wait|hold on|hang on|no not that",
        "Nothing was changed.",
    ),
    (
        r"start (?:over|again|anew)|reset|clear|new (?:picture|image|conversation|chat)|(?:i )?do not know|no idea",
        SAY_WHAT,
    ),
    (r"(?:i )?(?:do not understand|am (?:lost|confused))", CAN_DO),
    (
        r"(?:who|what) (?:are|r) (?:you|u)|what is your name|do you have a name|are you (?:an? )?(?:ai|bot"
        r"|robot|human|person"
        r"|model|machine|real|alive)|(?:introduce|tell me about|describe) yourself|who is this",
        f"I am mm, a small model that draws and reads pictures. {CAN_DO}",
    ),
    (
        r"help(?: me)?|what (?:can|do) (?:you|i|we) (?:do|say|draw|ask|know|type|write)(?: here| for me)?"
        r"|how (?:do|does|can) "
        r"(?:this|it|you|i) (?:work|use this|use it|start|begin)|what (?:should|shall|could) i (?:do|say|ask"
        r"|type|draw|write)"
        r"|(?:what are )?(?:the |your )?(?:instructions|commands|options|abilities|skills)|can you help(?: me)?"
        r"|i need help"
        r"|what now|what else can you do|are you there",
        CAN_DO,
    ),
    (
        r"how are (?:you|things)(?: doing)?(?: today)?|how do you do|how is it going|what is up",
        "I am well. What can I draw for you?",
    ),
    (r"nice to meet you|pleased to meet you", HELLO),
    (
        rf"(?:(?:that|this|it|they|you)(?: is| are| was"
        rf"| looks?)? |looks? )?(?:{_VERY} )*(?:an? )?(?:{_PRAISE})(?: (?:job|work|one|picture|cat|"
        rf"drawing|enough|indeed|thanks|thank you))*|(?:i )?(?:{_VERY} )?(?:like|love) (?:it|this|that"
        rf"|them)(?: {_VERY})*|wow|haha|lol|bravo",
        "Thank you!",
    ),
    (
        r"(?:(?:that|this|it|you)(?: is| are| was| looks?)? )?(?:very |all |so )?(?:wrong|bad|ugly|awful"
        r"|terrible|not (?:right|good|it"
        r"|correct|nice|what i (?:asked|wanted|meant|said)(?: for)?))|i do not like (?:it|this|that|them)|oh no",
        "I am sorry. Say what to change, or ask for a new picture.",
    ),
    (r"(?:i am )?(?:so )?(?:sorry|excuse me|pardon)(?: me)?", "No problem. What can I draw for you?"),
    (
        r"(?:ok|okay|yes|yeah|yep|(?:no )*no|nope|sure|fine|alright|all right|right|i see|hm+|um+|maybe|good|got it"
        r"|understood|test|testing)",
        "What can I draw or change for you?",
    ),
    (
        r"(?:draw|show|make|create|paint)(?: me)?(?: something| anything| a picture| an image| a drawing)?|surprise me",
        SAY_WHAT,
    ),
)


def small_talk(line: str) -> str | None:
    """The reply to a line of small talk (lower case, without marks); None for anything else."""
    return next((reply for pattern, reply in _REPLIES if re.fullmatch(pattern, line)), None)


def without_greeting(line: str) -> str:
    """The line without a greeting, a thank you or a praise before the rest."""
    found = re.match(
        rf"(?:{_GREETING}|thanks|thank you|great|nice|cool|good|perfect|wow|sorry|ok|okay|yes|no|well"
        rf"|right)\s*[,.!;:-]+\s*(?=\w)",
        line,
    )
    return line[found.end() :] if found else line
