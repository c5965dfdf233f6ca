package netif

import "unsafe"

// The layouts of xen/include/public/io/netif.h. Only Sizeof, Alignof and Offsetof of
// unsafe are used: nothing here makes a pointer.
var (
	_ [12]byte = [unsafe.Sizeof(TxRequest{})]byte{}
	_ [4]byte  = [unsafe.Alignof(TxRequest{})]byte{}
	_ [0]byte  = [unsafe.Offsetof(TxRequest{}.Ref)]byte{}
	_ [4]byte  = [unsafe.Offsetof(TxRequest{}.Offset)]byte{}
	_ [6]byte  = [unsafe.Offsetof(TxRequest{}.Flags)]byte{}
	_ [8]byte  = [unsafe.Offsetof(TxRequest{}.ID)]byte{}
	_ [10]byte = [unsafe.Offsetof(TxRequest{}.Size)]byte{}

	_ [4]byte = [unsafe.Sizeof(TxResponse{})]byte{}
	_ [4]byte = [unsafe.Alignof(TxResponse{})]byte{}
	_ [0]byte = [unsafe.Offsetof(TxResponse{}.ID)]byte{}
	_ [2]byte = [unsafe.Offsetof(TxResponse{}.Status)]byte{}

	_ [8]byte = [unsafe.Sizeof(RxRequest{})]byte{}
	_ [4]byte = [unsafe.Alignof(RxRequest{})]byte{}
	_ [0]byte = [unsafe.Offsetof(RxRequest{}.ID)]byte{}
	_ [2]byte = [unsafe.Offsetof(RxRequest{}.Pad)]byte{}
	_ [4]byte = [unsafe.Offsetof(RxRequest{}.Ref)]byte{}

	_ [8]byte = [unsafe.Sizeof(RxResponse{})]byte{}
	_ [4]byte = [unsafe.Alignof(RxResponse{})]byte{}
	_ [0]byte = [unsafe.Offsetof(RxResponse{}.ID)]byte{}
	_ [2]byte = [unsafe.Offsetof(RxResponse{}.Offset)]byte{}
	_ [4]byte = [unsafe.Offsetof(RxResponse{}.Flags)]byte{}
	_ [6]byte = [unsafe.Offsetof(RxResponse{}.Status)]byte{}

	_ [8]byte = [unsafe.Sizeof(Extra{})]byte{}
	_ [4]byte = [unsafe.Alignof(Extra{})]byte{}
	_ [0]byte = [unsafe.Offsetof(Extra{}.Type)]byte{}
	_ [1]byte = [unsafe.Offsetof(Extra{}.Flags)]byte{}
	_ [2]byte = [unsafe.Offsetof(Extra{}.Body)]byte{}

	_ [16]byte = [unsafe.Sizeof(CtrlRequest{})]byte{}
	_ [4]byte  = [unsafe.Alignof(CtrlRequest{})]byte{}
	_ [0]byte  = [unsafe.Offsetof(CtrlRequest{}.ID)]byte{}
	_ [2]byte  = [unsafe.Offsetof(CtrlRequest{}.Type)]byte{}
	_ [4]byte  = [unsafe.Offsetof(CtrlRequest{}.Data)]byte{}

	_ [12]byte = [unsafe.Sizeof(CtrlResponse{})]byte{}
	_ [4]byte  = [unsafe.Alignof(CtrlResponse{})]byte{}
	_ [0]byte  = [unsafe.Offsetof(CtrlResponse{}.ID)]byte{}
	_ [2]byte  = [unsafe.Offsetof(CtrlResponse{}.Type)]byte{}
	_ [4]byte  = [unsafe.Offsetof(CtrlResponse{}.Status)]byte{}
	_ [8]byte  = [unsafe.Offsetof(CtrlResponse{}.Data)]byte{}

	_ [GrefEntrySize]byte = [unsafe.Sizeof(GrefEntry{})]byte{}
	_ [4]byte             = [unsafe.Alignof(GrefEntry{})]byte{}
	_ [0]byte             = [unsafe.Offsetof(GrefEntry{}.Ref)]byte{}
	_ [4]byte             = [unsafe.Offsetof(GrefEntry{}.Flags)]byte{}
	_ [6]byte             = [unsafe.Offsetof(GrefEntry{}.Status)]byte{}
)

// Each stride is the size of the larger record.
var (
	_ [TxStride]byte   = [max(unsafe.Sizeof(TxRequest{}), unsafe.Sizeof(TxResponse{}))]byte{}
	_ [RxStride]byte   = [max(unsafe.Sizeof(RxRequest{}), unsafe.Sizeof(RxResponse{}))]byte{}
	_ [CtrlStride]byte = [max(unsafe.Sizeof(CtrlRequest{}), unsafe.Sizeof(CtrlResponse{}))]byte{}
)
