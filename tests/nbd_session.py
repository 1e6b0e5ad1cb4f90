# Run by nbdsh: requests that a well-behaved client does not send, and what the server says to each.
import errno
import nbd


def refused(number, call, *args, **flags):
    try:
        call(*args, **flags)
    except nbd.Error as error:
        got = error.errnum
    else:
        got = 0
    assert got == number, (call, args, flags, errno.errorcode.get(got, got), errno.errorcode[number])


def connect(socket, structured=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    if structured:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(socket)
    return h


def errors(h, structured):
    size = h.get_size()
    sector = bytes(512)
    refused(errno.EINVAL, h.pread, 512, size)
    refused(errno.EINVAL, h.pread, 1024, size - 512)
    refused(errno.EINVAL, h.pread, 512, 1)
    refused(errno.ENOSPC, h.pwrite, sector, size)
    refused(errno.ENOSPC, h.pwrite, sector, 2**63 - 512)
    refused(errno.EINVAL, h.pwrite, sector, 1)
    refused(errno.EINVAL, h.pwrite, sector, 0, flags=nbd.CMD_FLAG_NO_HOLE)
    refused(errno.ENOSPC, h.zero, 512, size)
    refused(errno.EINVAL, h.trim, 512, size)
    refused(errno.EINVAL, h.cache, 512, 0)
    refused(errno.EINVAL, h.pread, 33 << 20, 0)
    refused(errno.EINVAL, h.pwrite, bytes(33 << 20), 0)
    if not structured:
        refused(errno.EINVAL, h.pread, 512, 0, flags=nbd.CMD_FLAG_DF)
    if structured:
        refused(errno.EOVERFLOW, h.pread, 33 << 20, 0, flags=nbd.CMD_FLAG_DF)
        refused(errno.EINVAL, h.block_status, 512, size, lambda *args: 0)
    assert h.pread(512, 0) == sector


def good(h, structured):
    fua = nbd.CMD_FLAG_FUA
    block = bytes(range(256)) * 16
    h.pwrite(block, 4096, flags=fua)
    assert h.pread(4096, 4096) == block
    if structured:
        assert h.pread(4096, 4096, flags=nbd.CMD_FLAG_DF) == block
        chunks = []
        h.pread_structured(4096, 4096, lambda data, offset, status, error: chunks.append((len(data), offset, status)))
        assert chunks == [(4096, 4096, nbd.READ_DATA)], chunks
        extents = []
        h.block_status(1 << 20, 4096, lambda name, offset, entries, error: extents.append((name, offset, entries)))
        assert extents == [("base:allocation", 4096, [1 << 20, 0])], extents
    h.zero(512, 4096 + 512, flags=fua | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
    h.trim(512, 4096 + 1024, flags=fua)
    assert h.pread(4096, 4096) == block[:512] + bytes(1024) + block[1536:]
    h.flush()
    # Length 0: allowed, and nothing happens.
    h.pwrite(b"", 0)
    h.trim(0, 0)
    h.zero(0, 0)
    h.zero(h.get_size(), 0)


def settle(h, cookies):
    while h.aio_in_flight() > 0:
        h.poll(-1)
    for cookie in cookies:
        assert h.aio_command_completed(cookie)


def pipelined(h):
    blocks = [bytearray([i]) * 65536 for i in range(64)]
    settle(h, [h.aio_pwrite(nbd.Buffer.from_bytearray(b), i * 65536) for i, b in enumerate(blocks)])
    buffers = [nbd.Buffer(65536) for _ in blocks]
    settle(h, [h.aio_pread(b, i * 65536) for i, b in enumerate(buffers)])
    assert [b.to_bytearray() for b in buffers] == blocks


def haggle(socket):
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.set_full_info(True)
    h.connect_unix(socket)
    names = []
    assert h.opt_list(lambda name, text: names.append(name)) == 2 and names == ["data", "again"]
    h.set_export_name("again")
    h.add_meta_context("base:allocation")
    h.add_meta_context("x-none:x")
    h.opt_info()
    assert h.can_meta_context("base:allocation") and not h.can_meta_context("x-none:x")
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
    h.set_export_name("nothing")
    refused(errno.ENOENT, h.opt_go)
    h.set_export_name("data")
    h.opt_go()
    assert h.get_canonical_export_name() == "data"
    h.shutdown()
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(socket)
    h.opt_abort()


def everything(socket):
    for structured in (True, False):
        h = connect(socket, structured)
        assert h.get_structured_replies_negotiated() == structured
        h.zero(1 << 20, 0)
        errors(h, structured)
        good(h, structured)
        pipelined(h)
        other = connect(socket)
        assert other.pread(512, 63 * 65536) == bytes([63]) * 512
        h.shutdown()
        other.shutdown()
    haggle(socket)
