"""`/slots`: conversations by number, and states that clients save, restore and erase by name."""

from typing import Any, Literal

from fastapi import Request

from rgexport.errors import RequestError
from rgexport.serve.requests import SlotRequest
from rgexport.serve.server import server_of
from rgexport.serve.slots import slot_from


async def slots(request: Request) -> list[dict[str, Any]]:
    server = server_of(request)
    return [
        {"id": number, "model": name, "n_prompt_tokens": slot.count}
        for name, number, slot in server.slots.of(server.client(request).owner)
    ]


async def act(
    request: Request,
    slot: int,
    action: Literal["save", "restore", "erase"],
    body: SlotRequest | None = None,
) -> dict[str, Any]:
    server, body = server_of(request), body or SlotRequest()
    client, name = server.client(request), body.filename
    model_name, model = server.model(body.model)
    key = client.owner, model_name, slot
    if action == "erase" and name is None:
        erased = server.slots.pop(*key)
        return {"id_slot": slot, "n_erased": erased.count if erased else 0}
    if name is None:
        raise RequestError("filename: it is missing; give a name for the state")
    answer: dict[str, Any] = {"id_slot": slot, "filename": name}
    if action == "erase":
        await server.saved.erase(client, name)
        return answer
    if action == "restore":
        saved = await server.saved.restore(client, name, model)
        if restored := slot_from(saved):
            server.slots.put(*key, restored)
        return answer | {"n_restored": saved.position}
    await server.saved.require_space(client, name)
    if (seen := server.slots.get(*key)) is None:
        raise RequestError(f"slot {slot} has seen nothing yet; nothing is saved")
    ids = await server.offload.run("long", request, seen.ids, model)
    state = await model.astate(ids[:-1] or ids, client=client.name, namespace=client.namespace)
    saved = model.saved_state(ids, state, seen.messages)
    written = await server.saved.save(client, name, model, saved)
    return answer | {"n_saved": saved.position, "n_written": written}
