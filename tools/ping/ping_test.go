package ping

import (
	"bytes"
	"testing"
)

func TestOnlyTheReplyToARequestIsOne(t *testing.T) {
	ask, err := Request(7)
	if err != nil || len(ask) != 64 || ask[0] != 8 {
		t.Fatalf("% x, %v", ask, err)
	}
	var sum uint32
	for i := 0; i < len(ask); i += 2 {
		sum += uint32(ask[i])<<8 | uint32(ask[i+1])
	}
	if sum = sum>>16 + sum&0xffff; sum != 0xffff {
		t.Errorf("the checksum is wrong: sum %#x", sum)
	}
	reply := bytes.Clone(ask)
	reply[0] = 0
	if !IsReply(reply, 7) {
		t.Error("the reply is none")
	}
	if IsReply(ask, 7) {
		t.Error("the request is its own reply")
	}
	for _, at := range []int{4, 5, 6, 7, 8, 63} {
		wrong := bytes.Clone(reply)
		wrong[at] ^= 1
		if IsReply(wrong, 7) {
			t.Errorf("a reply with another byte %d is one", at)
		}
	}
	for _, n := range []int{0, 4, 7, 8, 63} {
		if IsReply(reply[:n], 7) {
			t.Errorf("%d bytes of a reply are one", n)
		}
	}
}
